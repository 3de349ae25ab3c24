//! The one error type of the crate: every variant names what was expected and what came.

use std::path::PathBuf;

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with the argument, tensor, key or file it went wrong at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor argument of the wrong shape.
    #[error("{name}: expected shape {expected}, got {got:?}")]
    Shape {
        /// The argument or tensor name, as in `selective_scan: delta`.
        name: String,
        /// The expected shape, in symbols and numbers, as in `[B, L, D] = [2, 8, 64]`.
        expected: String,
        /// The shape that came.
        got: Vec<usize>,
    },
    /// A tensor argument of the wrong dtype.
    #[error("{name}: expected dtype {expected}, got {got:?}")]
    DType {
        /// The argument or tensor name.
        name: String,
        /// The accepted dtypes.
        expected: String,
        /// The dtype that came.
        got: candle_core::DType,
    },
    /// A value outside its range: an option, a token id, a state, a length.
    #[error("{name}: expected {expected}, got {got}")]
    Value {
        /// The argument's name.
        name: String,
        /// What is accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// A configuration key whose value is missing, inconsistent, or asks for something not supported.
    #[error("{file}: key `{key}`: expected {expected}, got {got}")]
    Config {
        /// The file (or config struct) that holds the key.
        file: String,
        /// The key.
        key: String,
        /// What is accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// A file that is not what its name promises: truncated, garbage, not JSON.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what was expected.
        reason: String,
    },
    /// A checkpoint whose tensors do not fit the model; all of them are listed at once.
    #[error("{}: {} missing, {} unexpected, {} of the wrong shape or dtype:{}", path.display(),
        missing.len(), unexpected.len(), wrong.len(), listing(missing, unexpected, wrong))]
    Tensors {
        /// The checkpoint.
        path: PathBuf,
        /// Names the model needs and the file lacks.
        missing: Vec<String>,
        /// Names the file has and the model does not know.
        unexpected: Vec<String>,
        /// `name: expected shape, got shape` for the rest.
        wrong: Vec<String>,
    },
    /// The operating system refused a file operation.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// An error of candle itself.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// A [`Error::Shape`].
    pub fn shape(name: impl Into<String>, expected: impl Into<String>, got: &[usize]) -> Self {
        Self::Shape { name: name.into(), expected: expected.into(), got: got.to_vec() }
    }

    /// A [`Error::DType`].
    pub fn dtype(name: impl Into<String>, expected: impl Into<String>, got: candle_core::DType) -> Self {
        Self::DType { name: name.into(), expected: expected.into(), got }
    }

    /// A [`Error::Value`].
    pub fn value(name: impl Into<String>, expected: impl Into<String>, got: impl ToString) -> Self {
        Self::Value { name: name.into(), expected: expected.into(), got: got.to_string() }
    }

    /// A [`Error::Io`] at `path`, for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}

fn listing(missing: &[String], unexpected: &[String], wrong: &[String]) -> String {
    let part = |title: &str, names: &[String]| match names {
        [] => String::new(),
        names => format!(" {title}: {};", names.join(", ")),
    };
    let all = part("missing", missing) + &part("unexpected", unexpected) + &part("wrong", wrong);
    all.trim_end_matches(';').to_string()
}
