//! Compiles `kernels/` under the feature `cuda`: every .cu to one fatbin that `src/backend/cuda` embeds.
//!
//! Architectures come from `CUDA_COMPUTE_CAP` (a list as in `80,90`), else from the GPU present; the machine code of
//! each is joined by the PTX of the newest, which later GPUs compile. nvcc is `NVCC`, or that of `CUDA_HOME`,
//! `CUDA_PATH` or `CUDA_TOOLKIT_ROOT_DIR`, or the one on the `PATH`. A file is compiled again when its text, that of a
//! header it includes or the command has changed; files are compiled in parallel.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, io, thread};

/// Asynchronous copies and bf16 arithmetic need as much.
const OLDEST_ARCHITECTURE: u32 = 80;
/// The architecture whose own instructions some kernels are written in.
const HOPPER: u32 = 90;
/// Grid constants and sm_90a need as much.
const OLDEST_TOOLKIT: (u32, u32) = (12, 0);

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(hopper_kernels)");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    for name in ["CUDA_COMPUTE_CAP", "NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_TOOLKIT_ROOT_DIR", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    match compile_kernels() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("\nsubquadratic, feature `cuda`: {reason}\n");
            ExitCode::FAILURE
        }
    }
}

fn compile_kernels() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo gave no OUT_DIR")?);
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=kernels/common");
    let nvcc = find_nvcc();
    check_version(&nvcc)?;
    let architectures = architectures()?;
    if architectures.contains(&HOPPER) {
        println!("cargo:rustc-cfg=hopper_kernels");
    }
    let flags = flags(&architectures);
    files("kernels/common", "cuh")?;
    let sources = files("kernels", "cu")?;
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(vec![]));
    let work = || {
        while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let (Err(reason), Ok(mut failures)) = (compile(&nvcc, &flags, source, &out), failures.lock()) {
                failures.push(reason);
            }
        }
    };
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    thread::scope(|scope| {
        for _ in 0..sources.len().min(jobs) {
            scope.spawn(work);
        }
    });
    match failures.into_inner() {
        Ok(failures) if failures.is_empty() => Ok(()),
        Ok(failures) => Err(failures.join("\n")),
        Err(_) => Err("a compilation panicked".into()),
    }
}

/// The files of a folder with an extension, in order.
fn files(folder: &str, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{folder}: {error}"))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|own| own == extension));
    files.sort();
    files.iter().for_each(|path| println!("cargo:rerun-if-changed={}", path.display()));
    Ok(files)
}

/// The text of a file and of all it includes, each once, as a hash.
fn fingerprint(source: &Path) -> io::Result<u64> {
    let (mut hash, mut waiting, mut next) = (DefaultHasher::new(), vec![source.to_path_buf()], 0);
    while let Some(path) = waiting.get(next).cloned() {
        let text = fs::read_to_string(&path)?;
        let included = text.lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next());
        for name in included.map(|name| path.with_file_name(name)) {
            if !waiting.contains(&name) {
                waiting.push(name);
            }
        }
        text.hash(&mut hash);
        next += 1;
    }
    Ok(hash.finish())
}

fn find_nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let name = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };
    // the PATH first: who puts another nvcc there means it
    let on_path = env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    let homes = ["CUDA_HOME", "CUDA_PATH", "CUDA_TOOLKIT_ROOT_DIR"].into_iter().filter_map(env::var_os);
    let folders: Vec<PathBuf> = on_path;
    let folders = folders.into_iter().chain(homes.map(|home| PathBuf::from(home).join("bin")));
    let usual = ["/usr/local/cuda/bin", "/opt/cuda/bin"].into_iter().map(PathBuf::from);
    let mut candidates = folders.chain(usual).map(|folder| folder.join(name));
    candidates.find(|path| path.is_file()).unwrap_or_else(|| name.into())
}

fn check_version(nvcc: &Path) -> Result<(), String> {
    let output = Command::new(nvcc).arg("--version").output().map_err(|error| {
        format!(
            "cannot run the CUDA compiler `{}`: {error}. Install the CUDA toolkit {}.{} or newer, and set CUDA_HOME to \
             its folder or put its bin on the PATH",
            nvcc.display(),
            OLDEST_TOOLKIT.0,
            OLDEST_TOOLKIT.1
        )
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let release = text.split("release ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or("");
    let mut numbers = release.split('.').map(|number| number.trim().parse::<u32>());
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= OLDEST_TOOLKIT => Ok(()),
        (Some(Ok(_)), Some(Ok(_))) => Err(format!(
            "`{}` is CUDA {release}; {}.{} or newer is needed",
            nvcc.display(),
            OLDEST_TOOLKIT.0,
            OLDEST_TOOLKIT.1
        )),
        _ => Err(format!("`{} --version` names no release:\n{text}", nvcc.display())),
    }
}

/// Compute capabilities without the dot, in order.
fn architectures() -> Result<Vec<u32>, String> {
    let (list, origin) = match env::var("CUDA_COMPUTE_CAP") {
        Ok(list) if !list.trim().is_empty() => (list, "CUDA_COMPUTE_CAP"),
        _ => (present()?, "nvidia-smi"),
    };
    let parse = |item: &str| {
        let digits: String = item.chars().filter(|c| *c != '.').collect();
        match digits.trim_end_matches(['a', 'f']).parse() {
            Ok(number) if number >= OLDEST_ARCHITECTURE => Ok(number),
            Ok(_) => Err(format!("{origin}: compute capability {item} is below {OLDEST_ARCHITECTURE}")),
            Err(_) => Err(format!("{origin}: expected compute capabilities as in `80,90`, got `{item}`")),
        }
    };
    let items = list.split([',', ';', ' ', '\n']).map(str::trim).filter(|item| !item.is_empty());
    let mut numbers: Vec<u32> = items.map(parse).collect::<Result<_, _>>()?;
    numbers.sort_unstable();
    numbers.dedup();
    if numbers.is_empty() { Err(format!("{origin} names no architecture")) } else { Ok(numbers) }
}

fn present() -> Result<String, String> {
    let query = ["--query-gpu=compute_cap", "--format=csv,noheader"];
    let output = Command::new("nvidia-smi").args(query).output();
    let text = match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        _ => String::new(),
    };
    if text.trim().is_empty() {
        return Err("no GPU is present to compile for: set CUDA_COMPUTE_CAP, as in `90` for an H100".into());
    }
    Ok(text)
}

fn flags(architectures: &[u32]) -> Vec<String> {
    let mut flags: Vec<String> = ["-fatbin", "-O3", "-std=c++17"].map(String::from).into();
    if cfg!(windows) {
        // the toolkit's headers need the conforming preprocessor from CUDA 13 on
        flags.extend(["-Xcompiler", "/Zc:preprocessor", "-D_USE_MATH_DEFINES"].map(String::from));
    }
    for number in architectures {
        // Hopper's own instructions exist in the variant alone
        let name = if *number == HOPPER { "90a".to_string() } else { number.to_string() };
        flags.push(format!("-gencode=arch=compute_{name},code=sm_{name}"));
    }
    if let Some(newest) = architectures.last() {
        flags.push(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    }
    flags
}

fn compile(nvcc: &Path, flags: &[String], source: &Path, out: &Path) -> Result<(), String> {
    let name = source.file_stem().unwrap_or_default();
    let (fatbin, record) = (out.join(name).with_extension("fatbin"), out.join(name).with_extension("cmd"));
    let failed = |what: &dyn std::fmt::Display| format!("compiling {} failed: {what}", source.display());
    let text = fingerprint(source).map_err(|error| failed(&error))?;
    let made_from = format!("{} {} {text:016x}", nvcc.display(), flags.join(" "));
    if fatbin.is_file() && fs::read_to_string(&record).is_ok_and(|last| last == made_from) {
        return Ok(());
    }
    let _ = fs::remove_file(&record);
    let output = Command::new(nvcc).args(flags).arg(source).arg("-o").arg(&fatbin).output();
    let output = output.map_err(|error| failed(&error))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
        return Err(failed(&text));
    }
    fs::write(&record, made_from).map_err(|error| failed(&error))
}
