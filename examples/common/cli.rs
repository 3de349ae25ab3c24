//! What every program begins and ends with: arguments, device and dtype, one line and exit status 1 on an error.

use candle_core::{DType, Device};
use clap::{Args, Parser, ValueEnum};
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use subquadratic::models::{LanguageModel, LoadOptions, load_with};

/// Tokens of a chunk where none is given.
pub const CHUNK: usize = 64;

/// `Result` of a program.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Parses the command line and runs `program`; whatever goes wrong is one line on standard error and exit status 1.
pub fn run<A: Parser>(program: impl FnOnce(A) -> Outcome<()>) -> ExitCode {
    subquadratic::reuse_memory();
    let outcome = match A::try_parse() {
        Ok(arguments) => program(arguments).map_err(|error| error.to_string()),
        Err(error) if error.use_stderr() => {
            let text = error.to_string();
            let reason = text.split("\n\n").next().unwrap_or_default();
            Err(reason.trim_start_matches("error: ").to_string() + " (--help lists the arguments)")
        }
        Err(help) => help.print().map_err(|error| error.to_string()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("error: {}", reason.split_whitespace().collect::<Vec<_>>().join(" "));
            ExitCode::FAILURE
        }
    }
}

/// Where to compute, and in what.
#[derive(Args, Clone, Copy, Debug)]
pub struct Place {
    /// The device
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceName,
    /// The dtype of the weights: f32, f64, bf16 or f16
    #[arg(long, default_value = "f32", value_parser = parse_dtype)]
    pub dtype: DType,
    /// Take a checkpoint's poles even where they are stored in bf16 or f16, which makes other filters of them
    #[arg(long)]
    rounded_poles: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum DeviceName {
    Cpu,
    Cuda,
    Metal,
}

impl Place {
    /// The device's name.
    pub fn name(&self) -> &'static str {
        match self.device {
            DeviceName::Cpu => "cpu",
            DeviceName::Cuda => "cuda",
            DeviceName::Metal => "metal",
        }
    }

    /// The model of a checkpoint's directory, on `device`; what was tolerated in it is told on standard error.
    pub fn load(&self, directory: &Path, device: &Device) -> Outcome<LanguageModel> {
        let options = LoadOptions { rounded_poles: self.rounded_poles, ..LoadOptions::default() };
        let model = load_with(directory, self.dtype, device, options)?;
        model.notes().iter().for_each(|note| eprintln!("note: {note}"));
        Ok(model)
    }

    /// The device, opened.
    pub fn device(&self) -> Outcome<Device> {
        let name = self.name();
        let opened = match self.device {
            DeviceName::Cpu => return Ok(Device::Cpu),
            DeviceName::Cuda => Device::new_cuda(0),
            DeviceName::Metal => Device::new_metal(0),
        };
        opened.map_err(|error| {
            format!("--device {name}: {error} (is the program built with `--features {name}`?)").into()
        })
    }
}

fn parse_dtype(name: &str) -> Result<DType, String> {
    match name {
        "f32" => Ok(DType::F32),
        "f64" => Ok(DType::F64),
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        _ => Err("expected f32, f64, bf16 or f16".into()),
    }
}
