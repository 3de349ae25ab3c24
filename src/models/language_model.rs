//! The one language model.

use super::Form;
use super::block::{Block, Stream};
use super::config::{EMBEDDING_NORM, FINAL_NORM, ModelConfig, SCORE, block_name};
use super::state::ModelState;
use crate::layers::parameter::normal;
use crate::layers::{Mlp, NormConfig, NormLayer};
use crate::ops::embedding::rows;
use crate::ops::{accumulation_dtype, embedding};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use rand::{SeedableRng, rngs::StdRng};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// A language model: embedding, blocks, final norm, head; see [`ModelConfig`].
///
/// Token ids are `[B, L]` (u32, u8 or i64), logits `[B, L, V]` in the dtype of the weights. An inference model holds
/// plain tensors; a trainable one holds variables, whose gradients candle's `backward` finds.
#[derive(Clone, Debug)]
pub struct LanguageModel {
    pub(super) config: ModelConfig,
    pub(super) dtype: DType,
    pub(super) device: Device,
    parameters: BTreeMap<String, Tensor>,
    variables: BTreeMap<String, Var>,
    pub(super) embedding: Tensor,
    pub(super) blocks: Vec<Arc<Block>>,
    pub(super) block_variables: Vec<Vec<Tensor>>,
    pub(super) embedding_norm: Option<NormLayer>,
    pub(super) final_norm: Option<NormLayer>,
    pub(super) head: Tensor,
    pub(super) score: Option<Tensor>,
    pub(super) recompute: bool,
    pub(super) form: Form,
    pub(super) kind: String,
    pub(super) notes: Vec<String>,
}

impl LanguageModel {
    /// Builds the model from the tensors that `vb` gives under the family's own names.
    ///
    /// Parameters that are candle variables (those of a `VarMap`, for instance) stay so.
    ///
    /// # Errors
    /// An inconsistent config, a missing tensor or another shape.
    pub fn new(config: &ModelConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let family = config.family;
        let vb = vb.rename_f(move |name| family.upstream_name(name));
        let mut tensors = HashMap::new();
        for parameter in config.parameters() {
            tensors.insert(parameter.name.clone(), parameter.read(&vb)?);
        }
        Self::from_tensors(config, tensors, vb.dtype(), vb.device())
    }

    /// A trainable model with the published initialisation, the same for the same seed.
    ///
    /// # Errors
    /// An inconsistent config, or a dtype that is no float.
    pub fn init(config: &ModelConfig, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        config.validate()?;
        check_dtype(dtype)?;
        let values = initial_values(config, seed)?;
        let mut tensors = HashMap::new();
        for parameter in config.parameters() {
            let value = values
                .get(&parameter.name)
                .ok_or_else(|| Error::value(&parameter.name, "an initial value", "none"))?;
            let value = value.to_dtype(parameter.dtype(dtype))?.to_device(device)?;
            tensors.insert(parameter.name, Var::from_tensor(&value)?.into_inner());
        }
        Self::from_tensors(config, tensors, dtype, device)
    }

    /// From tensors under this crate's names, of the shapes and dtypes that the config's parameters say.
    pub(super) fn from_tensors(
        config: &ModelConfig,
        tensors: HashMap<String, Tensor>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        check_dtype(dtype)?;
        let upstream = |name: &str| config.family.upstream_name(name);
        let parameters: BTreeMap<_, _> = tensors.iter().map(|(n, x)| (upstream(n), x.clone())).collect();
        let variables = tensors.iter().filter(|(_, x)| x.is_variable());
        let variables = variables.map(|(n, x)| Ok((upstream(n), Var::from_tensor(x)?)));
        let variables = variables.collect::<Result<BTreeMap<_, _>>>()?;
        let in_block = |i: usize| {
            let prefix = block_name(i) + ".";
            let mut own: Vec<_> = tensors.iter().filter(|(n, _)| n.starts_with(&prefix)).collect();
            own.sort_by(|a, b| a.0.cmp(b.0));
            own.into_iter().filter(|(_, x)| x.is_variable()).map(|(_, x)| x.clone()).collect()
        };
        let block_variables =
            if variables.is_empty() { vec![] } else { (0..config.blocks.len()).map(in_block).collect() };

        let vb = VarBuilder::from_tensors(tensors, dtype, device);
        let block = |(i, block)| Ok(Arc::new(Block::new(block, config.hidden_size, vb.pp(block_name(i)))?));
        let norm = |norm: &Option<NormConfig>, name: &str| {
            norm.as_ref().map(|norm| NormLayer::new(norm, config.hidden_size, vb.pp(name))).transpose()
        };
        let rows = (config.vocab_rows(), config.hidden_size);
        let embedding = vb.get(rows, "backbone.embeddings.weight")?;
        let own = config.lm_head && !config.tie_embeddings;
        let head = if own { vb.get(rows, "lm_head.weight")? } else { embedding.clone() };
        let scores = (config.labels, config.hidden_size);
        let score = if config.labels > 0 { Some(vb.get(scores, SCORE)?) } else { None };
        Ok(Self {
            dtype,
            device: device.clone(),
            parameters,
            variables,
            embedding,
            blocks: config.blocks.iter().enumerate().map(block).collect::<Result<_>>()?,
            block_variables,
            embedding_norm: norm(&config.embedding_norm, EMBEDDING_NORM)?,
            final_norm: norm(&config.final_norm, FINAL_NORM)?,
            head,
            score,
            recompute: false,
            form: Form::Auto,
            kind: kind(config),
            notes: vec![],
            config: config.clone(),
        })
    }

    /// What it was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The dtype of the weights. Decays and states are f32 or wider.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// What [`load`](super::load) found and tolerated: layers in a config that are not there, poles outside the unit
    /// circle, rounded poles. One line each, for a program to show.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// All parameters under their upstream names; those of a trainable model are tracked.
    pub fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    /// The parameters that train, under their upstream names: none for an inference model.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    /// Whether blocks forget their activations and compute them again on the way back (off at first): memory falls to
    /// that of one block and the stream between blocks, for the price of a second forward pass.
    pub fn set_recompute(&mut self, recompute: bool) {
        self.recompute = recompute;
    }

    /// Chooses among the equal forms of those mixers that have several (retention); the others are left as they are.
    /// Returns whether any mixer has forms.
    ///
    /// # Errors
    /// Chunks of no tokens.
    pub fn set_form(&mut self, form: Form) -> Result<bool> {
        form.validate()?;
        let set = |any, block: &mut Arc<Block>| Ok::<_, Error>(Arc::make_mut(block).set_form(form)? | any);
        let any = self.blocks.iter_mut().try_fold(false, set)?;
        // long inputs go through the stack in pieces, unless a mixer must see them whole
        self.form = if any { form } else { Form::Auto };
        Ok(any)
    }

    /// The same weights, shared, with nothing tracked: for evaluation and generation between training steps.
    ///
    /// Take a new one after the variables have changed.
    ///
    /// # Errors
    /// None in practice.
    pub fn frozen(&self) -> Result<Self> {
        let ours = self.config.parameters().into_iter().map(|p| p.name);
        let detached = ours.filter_map(|name| {
            let tensor = self.parameters.get(&self.config.family.upstream_name(&name))?.detach();
            Some((name, tensor))
        });
        let mut frozen = Self::from_tensors(&self.config, detached.collect(), self.dtype, &self.device)?;
        frozen.set_form(self.form)?;
        frozen.notes = self.notes.clone();
        Ok(frozen)
    }

    /// Refuses weights that are not finite, naming the tensors. Reads every weight once.
    ///
    /// # Errors
    /// The names of all tensors with a NaN or an infinity.
    pub fn check_finite(&self) -> Result<()> {
        let mut bad = vec![];
        for (name, tensor) in &self.parameters {
            // zero times a NaN or an infinity is a NaN, and so is every sum with it
            let x = tensor.detach();
            let x = if x.dtype() == DType::F64 { x } else { x.to_dtype(DType::F32)? };
            let sum = x.affine(0.0, 0.0)?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            if sum.is_nan() {
                bad.push(name.as_str());
            }
        }
        if bad.is_empty() {
            return Ok(());
        }
        Err(Error::value("weights", "finite numbers", format!("NaN or infinity in {}", bad.join(", "))))
    }

    /// The state before the first token of `batch` sequences.
    ///
    /// # Errors
    /// A batch of zero.
    pub fn init_state(&self, batch: usize) -> Result<ModelState> {
        if batch == 0 {
            return Err(Error::value("batch", "at least 1", batch));
        }
        let blocks = self.blocks.iter().map(|block| block.init_state(batch)).collect::<Result<_>>()?;
        Ok(ModelState { blocks, positions: vec![0; batch], model: self.kind.clone() })
    }

    /// The head: `[.., D]` to `[.., V]`.
    pub(super) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        if !self.config.lm_head {
            let expected =
                "a model with a head for tokens; this one has labels alone: see classify and hidden_states";
            return Err(Error::value("logits", expected, self.config.family.name()));
        }
        let head = match self.config.vocab_size {
            size if size == self.head.dim(0)? => self.head.clone(),
            size => self.head.narrow(0, 0, size)?,
        };
        crate::ops::linear(hidden, &head, None)
    }

    /// The residual stream at its beginning: the tokens' embeddings, `[B, L, D]`.
    pub(super) fn embed(&self, ids: &Tensor) -> Result<Stream> {
        let x = match self.embedding.track_op() {
            true => embedding(&self.embedding, ids)?,
            false => rows(&self.embedding, ids)?,
        };
        let x =
            if self.config.embedding_scale == 1.0 { x } else { x.affine(self.config.embedding_scale, 0.0)? };
        let x = self.embedding_norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(&x))?;
        let wide = if self.config.residual_in_fp32 { accumulation_dtype(self.dtype) } else { self.dtype };
        Ok(Stream { sum: x.to_dtype(wide)?, update: None })
    }

    /// The residual stream at its end, as the head sees it: `[B, L, D]` in the dtype of the weights.
    pub(super) fn finish(&self, stream: Stream) -> Result<Tensor> {
        match &self.final_norm {
            Some(norm) => Ok(stream.norm(norm, self.dtype)?.1),
            None => Ok(stream.value()?.to_dtype(self.dtype)?),
        }
    }
}

/// Refuses dtypes that no model has.
pub(super) fn check_dtype(dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::F64 | DType::BF16 | DType::F16 => Ok(()),
        other => Err(Error::dtype("model", "f32, f64, bf16 or f16", other)),
    }
}

/// What a state must agree on with its model.
fn kind(config: &ModelConfig) -> String {
    let mut blocks: Vec<(String, usize)> = vec![];
    for block in &config.blocks {
        let name = block.mixer.describe();
        match blocks.last_mut() {
            Some((last, count)) if *last == name => *count += 1,
            _ => blocks.push((name, 1)),
        }
    }
    let blocks: Vec<String> = blocks.iter().map(|(name, count)| format!("{count} x {name}")).collect();
    format!(
        "{}: vocabulary {}, width {}, {}",
        config.family.name(),
        config.vocab_size,
        config.hidden_size,
        blocks.join(", ")
    )
}

/// The published initialisation under this crate's names, f32 on the CPU.
fn initial_values(config: &ModelConfig, seed: u64) -> Result<HashMap<String, Tensor>> {
    let rng = &mut StdRng::seed_from_u64(seed);
    let sums: usize = config.blocks.iter().map(|block| 1 + usize::from(block.mlp.is_some())).sum();
    let scale = if config.rescale_residual { (sums.max(1) as f64).powf(-0.5) } else { 1.0 };
    let width = config.hidden_size;
    let rows = [config.vocab_rows(), width];
    let mut all = HashMap::new();
    let mut insert = |prefix: &str, values: Vec<(String, Tensor)>| {
        all.extend(values.into_iter().map(|(name, value)| (format!("{prefix}.{name}"), value)));
    };
    insert("backbone", vec![("embeddings.weight".into(), normal(rng, &rows, config.initializer_range)?)]);
    for (i, block) in config.blocks.iter().enumerate() {
        let name = |part: &str| format!("{}.{part}", block_name(i));
        insert(&name("norm"), block.norm.init(width)?);
        insert(&name("mixer"), block.mixer.init(rng, scale)?);
        if let Some(mlp) = &block.mlp {
            insert(&name("norm2"), mlp.norm.init(width)?);
            insert(&name("mlp"), Mlp::init(&mlp.layer, rng, scale)?);
        }
    }
    for (name, norm) in [(EMBEDDING_NORM, &config.embedding_norm), (FINAL_NORM, &config.final_norm)] {
        if let Some(norm) = norm {
            insert(name, norm.init(width)?);
        }
    }
    if config.labels > 0 {
        let scores = normal(rng, &[config.labels, width], config.initializer_range)?;
        insert("score", vec![("weight".into(), scores)]);
    }
    if config.lm_head && !config.tie_embeddings {
        let bound = (width as f64).powf(-0.5);
        insert("lm_head", vec![("weight".into(), crate::layers::parameter::uniform(rng, &rows, bound)?)]);
    }
    Ok(all)
}
