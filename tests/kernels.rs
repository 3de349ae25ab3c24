//! Laws of the CUDA kernels' text, which need no GPU.

use std::fs;
use std::path::Path;

/// A kernel may be launched before the one ahead of it has ended (`src/backend/cuda/launch.rs`): it must wait first.
#[test]
fn every_kernel_takes_its_turn() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut kernels = 0;
    for folder in [root.clone(), root.join("common")] {
        for file in fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            if path.is_dir() {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap().replace('\\', " ");
            for kernel in text.split("__global__").skip(1) {
                let (head, body) = kernel.split_once('{').unwrap();
                kernels += 1;
                assert!(
                    body.trim_start().starts_with("take_turn();"),
                    "{}: a kernel begins with something else:{head}",
                    path.display()
                );
            }
        }
    }
    assert!(kernels > 30, "{kernels} kernels found");
}
