//! The keys of a `config.json`, each of which must be asked for.

use super::super::SpecialTokens;
use crate::ops::Activation;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::HashSet;
use std::path::Path;

/// Keys that change no logit, whatever their value: who made the file and when, how it is run, how text is drawn.
const HARMLESS: &[&str] = &[
    "add_cross_attention",
    "architectures",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

/// A JSON object whose keys are counted off as they are read.
pub(super) struct Keys<'a> {
    path: &'a Path,
    /// Comes before the key in messages, as in `ssm_cfg.`.
    prefix: String,
    object: Map<String, Value>,
    read: RefCell<HashSet<String>>,
    notes: RefCell<Vec<String>>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(path: &'a Path, value: Value) -> Result<Self> {
        Self::with_prefix(path, "", value)
    }

    fn with_prefix(path: &'a Path, prefix: &str, value: Value) -> Result<Self> {
        match value {
            Value::Object(object) => {
                let (read, notes) = (RefCell::default(), RefCell::default());
                Ok(Self { path, prefix: prefix.into(), object, read, notes })
            }
            other => {
                let at = if prefix.is_empty() { String::new() } else { format!("`{prefix}`: ") };
                let reason = format!("{at}expected a JSON object, got {}", short(&other));
                Err(Error::File { path: path.into(), reason })
            }
        }
    }

    /// The object under `key`, empty if there is none.
    pub(super) fn object(&self, key: &str) -> Result<Self> {
        let value = self.value(key).cloned().unwrap_or_else(|| Value::Object(Map::new()));
        Self::with_prefix(self.path, &format!("{}{key}.", self.prefix), value)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// The value under `key`, which counts as read; `null` is no value.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(key.to_string());
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Counts keys off that do not matter.
    pub(super) fn ignore(&self, keys: &[&str]) {
        self.read.borrow_mut().extend(keys.iter().map(|key| key.to_string()));
    }

    /// Tells of what is tolerated at `key` but is not as it should be.
    pub(super) fn note(&self, key: &str, what: &str) {
        let note = format!("{}: key `{}{key}`: {what}", self.path.display(), self.prefix);
        let mut notes = self.notes.borrow_mut();
        if !notes.contains(&note) {
            notes.push(note);
        }
    }

    pub(super) fn notes(self) -> Vec<String> {
        self.notes.into_inner()
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<String>> {
        self.typed(key, "a string", |value| value.as_str().map(String::from))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A whole number of at least one.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        let size = |value: &Value| value.as_u64().filter(|&n| n > 0).and_then(|n| usize::try_from(n).ok());
        self.typed(key, "a whole number of at least 1", size)
    }

    /// A whole number, 0 included.
    pub(super) fn count(&self, key: &str, default: usize) -> Result<usize> {
        let count = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        Ok(self.typed(key, "a whole number", count)?.unwrap_or(default))
    }

    /// The strings of a list.
    pub(super) fn texts(&self, key: &str) -> Vec<String> {
        let all = self.value(key).and_then(Value::as_array).into_iter().flatten();
        all.filter_map(|text| text.as_str().map(String::from)).collect()
    }

    /// How many labels a classifier tells apart: `num_labels`, or as many as `id2label` names, or 2.
    pub(super) fn labels(&self) -> Result<usize> {
        let named = self.value("id2label").and_then(Value::as_object).map(Map::len);
        Ok(self.size("num_labels")?.or(named).unwrap_or(2))
    }

    pub(super) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.wrong(key, "a whole number of at least 1", "nothing"))
    }

    /// A number of blocks.
    pub(super) fn layers(&self, key: &str, default: usize) -> Result<usize> {
        match self.size(key)?.unwrap_or(default) {
            layers if layers > crate::models::config::MAX_BLOCKS => {
                Err(self.wrong(key, "fewer layers", &layers.to_string()))
            }
            layers => Ok(layers),
        }
    }

    /// An activation by its name.
    pub(super) fn activation(&self, key: &str, default: Activation) -> Result<Activation> {
        let Some(name) = self.text(key)? else { return Ok(default) };
        let expected = "silu (or swish), gelu, gelu_tanh or relu";
        Activation::from_name(&name).ok_or_else(|| self.wrong(key, expected, &name))
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64> {
        let number = |value: &Value| value.as_f64().filter(|x| x.is_finite());
        Ok(self.typed(key, "a number", number)?.unwrap_or(default))
    }

    /// Refuses `key` unless it is absent or `accepted`.
    pub(super) fn only(&self, key: &str, accepted: &Value) -> Result<()> {
        match self.value(key) {
            Some(value) if value != accepted => Err(self.wrong(key, &accepted.to_string(), &short(value))),
            _ => Ok(()),
        }
    }

    /// `bos_token_id`, `eos_token_id` (one or several) and `pad_token_id`.
    pub(super) fn tokens(&self) -> Result<SpecialTokens> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = |value: &Value| match value {
            Value::Array(all) => all.iter().map(id).collect::<Option<Vec<u32>>>(),
            one => id(one).map(|id| vec![id]),
        };
        // a negative id means none
        let one = |key: &str| match self.value(key).and_then(Value::as_i64) {
            Some(negative) if negative < 0 => Ok(None),
            _ => self.typed(key, "a token id", id),
        };
        Ok(SpecialTokens {
            bos: one("bos_token_id")?,
            eos: self.typed("eos_token_id", "a token id or a list of them", ids)?.unwrap_or_default(),
            pad: one("pad_token_id")?,
        })
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(key, expected, &short(value)))
    }

    /// The error that `key` is not as `expected`.
    pub(super) fn wrong(&self, key: &str, expected: &str, got: &str) -> Error {
        Error::Config {
            file: self.path.display().to_string(),
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
            got: got.into(),
        }
    }

    /// Refuses the first key that nobody has asked for; see the folder's documentation for what passes.
    pub(super) fn refuse_unknown(&self) -> Result<()> {
        let read = self.read.borrow();
        for (key, value) in &self.object {
            let known = read.contains(key) || key.starts_with('_') || HARMLESS.contains(&key.as_str());
            let absent = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(all) => all.is_empty(),
                Value::Object(all) => all.is_empty(),
                Value::String(text) => text.is_empty(),
                _ => false,
            };
            if !known && !absent {
                return Err(self.wrong(key, "a key this family is known to have", &short(value)));
            }
        }
        Ok(())
    }
}

/// A value for a message: not the whole of a long one.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}..", &text[..end]),
        None => text,
    }
}
