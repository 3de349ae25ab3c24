//! The compiled kernels: one module for each .cu, loaded at its first use on a device and kept.

use super::device::shared_memory;
use super::{failed, memory};
use crate::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaModule, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A file of `kernels/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Module {
    ScanForward,
    ScanBackward,
    ScanCarry,
    ScanStep,
    CausalConv1d,
    Norm,
    NormHeads,
    Activation,
    Rotary,
    DecodeMamba,
    DecodeMambaAccept,
    DecodeRetNet,
    DecodeRetNetAccept,
    RetentionBf16,
    RetentionF16,
    RetentionF32,
    RetentionHopperBf16,
    RetentionHopperF16,
    RetentionCarry,
    RetentionStep,
    Training,
    Embedding,
}

macro_rules! embedded {
    ($name:literal) => {
        ($name, include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")))
    };
}

impl Module {
    fn image(self) -> (&'static str, &'static [u8]) {
        match self {
            Self::ScanForward => embedded!("selective_scan_fwd"),
            Self::ScanBackward => embedded!("selective_scan_bwd"),
            Self::ScanCarry => embedded!("selective_scan_carry"),
            Self::ScanStep => embedded!("selective_scan_step"),
            Self::CausalConv1d => embedded!("causal_conv1d"),
            Self::Norm => embedded!("norm"),
            Self::NormHeads => embedded!("norm_heads"),
            Self::Activation => embedded!("activation"),
            Self::Rotary => embedded!("rotary"),
            Self::DecodeMamba => embedded!("decode_mamba"),
            Self::DecodeMambaAccept => embedded!("decode_mamba_accept"),
            Self::DecodeRetNet => embedded!("decode_retnet"),
            Self::DecodeRetNetAccept => embedded!("decode_retnet_accept"),
            Self::RetentionBf16 => embedded!("retention_bf16"),
            Self::RetentionF16 => embedded!("retention_f16"),
            Self::RetentionF32 => embedded!("retention_f32"),
            Self::RetentionHopperBf16 => embedded!("retention_hopper_bf16"),
            Self::RetentionHopperF16 => embedded!("retention_hopper_f16"),
            Self::RetentionCarry => embedded!("retention_carry"),
            Self::RetentionStep => embedded!("retention_step"),
            Self::Training => embedded!("training"),
            Self::Embedding => embedded!("embedding"),
        }
    }
}

/// A kernel.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    pub(super) function: CudaFunction,
    /// The dynamic shared memory its blocks need.
    pub(super) memory: u32,
    /// Whether it may be launched before the one ahead of it has ended: whether it was compiled to wait for that.
    pub(super) early: bool,
}

#[derive(Default)]
struct Loaded {
    devices: HashSet<usize>,
    modules: HashMap<(usize, Module), Arc<CudaModule>>,
    kernels: HashMap<(usize, String), Kernel>,
}

/// Kernel `name` of `module` on a device. Where it is `dynamic`, the module's constant `<name>_memory` is the shared memory
/// that its blocks ask for at launch.
pub(super) fn kernel(device: &CudaDevice, module: Module, name: &str, dynamic: bool) -> Result<Kernel> {
    static LOADED: OnceLock<Mutex<Loaded>> = OnceLock::new();
    let mut loaded = LOADED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    let stream = device.cuda_stream();
    let ordinal = stream.context().ordinal();
    if let Some(kernel) = loaded.kernels.get(&(ordinal, name.to_string())) {
        return Ok(kernel.clone());
    }
    if loaded.devices.insert(ordinal) {
        memory::keep_freed(stream.context())?;
    }
    let own = match loaded.modules.get(&(ordinal, module)) {
        Some(module) => module.clone(),
        None => {
            let (file, image) = module.image();
            let what =
                format!("kernels/{file}.cu (is the driver older than the CUDA toolkit it was built with?)");
            let own = stream.context().load_module(Ptx::from_binary(image.to_vec()));
            let own = own.map_err(|error| failed(&what, error))?;
            loaded.modules.insert((ordinal, module), own.clone());
            own
        }
    };
    let function = own.load_function(name).map_err(|error| failed(name, error))?;
    let mut memory = 0;
    if dynamic {
        let constant =
            own.get_global(&format!("{name}_memory"), &stream).map_err(|error| failed(name, error))?;
        let bytes = stream.clone_dtoh(&constant).map_err(|error| failed(name, error))?;
        memory = bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        allow_memory(device, &function)?;
    }
    let compiled_for = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PTX_VERSION;
    let compiled_for = function.get_attribute(compiled_for).map_err(|error| failed(name, error))?;
    let kernel = Kernel { function, memory, early: compiled_for >= 90 };
    loaded.kernels.insert((ordinal, name.to_string()), kernel.clone());
    Ok(kernel)
}

/// Lets a kernel's blocks ask for all the shared memory that a block may have.
pub(super) fn allow_memory(device: &CudaDevice, function: &CudaFunction) -> Result<()> {
    let (most, own) = (
        sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
    );
    let all = shared_memory(device)? as i32;
    let allowed = function.get_attribute(own).and_then(|own| function.set_attribute(most, all - own));
    allowed.map_err(|error| failed("the shared memory of a kernel", error))
}

/// Whether a block of a dynamic kernel gets the shared memory it asks for on this device.
pub(crate) fn fits(device: &CudaDevice, module: Module, name: &str) -> Result<bool> {
    Ok(kernel(device, module, name, true)?.memory as usize <= shared_memory(device)?)
}
