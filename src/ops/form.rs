//! Equal ways of computing a recurrence.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How a recurrence that has several equal forms is computed; results agree up to rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// Whatever is fastest for the shape.
    #[default]
    Auto,
    /// All pairs of tokens at once: quadratic in the length.
    Parallel,
    /// All pairs within chunks, a state between them: linear in the length.
    Chunkwise {
        /// Tokens of a chunk, at least 1.
        chunk: usize,
    },
    /// Token by token.
    Recurrent,
}

impl Form {
    /// Checks the size of the chunks.
    ///
    /// # Errors
    /// Chunks of no tokens.
    pub fn validate(self) -> Result<()> {
        match self {
            Self::Chunkwise { chunk: 0 } => Err(Error::value("chunk", "at least 1 token", 0)),
            _ => Ok(()),
        }
    }
}
