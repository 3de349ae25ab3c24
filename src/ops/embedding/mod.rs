//! Rows of a table: where a language model begins.
//!
//! ```text
//! y[t] = weight[ids[t]]        dweight[v] = sum over all t with ids[t] = v of dy[t]
//! ```
//!
//! The gradient's rows are added up in f32 (f64 for f64) in the order of the tokens and rounded once, one task for each
//! id that occurs: the same bits for any number of threads, and as fast for one frequent token as its bytes allow.
//! (candle's own gradient adds in the weight's dtype, on CUDA with one thread a column for all tokens.)

#[cfg(feature = "cuda")]
mod cuda;
mod reference;

pub use reference::embedding_reference;
pub(crate) use reference::rows;

use crate::autograd::{record, storage_of};
use crate::backend::cpu::matrix::{Held, Matrix, as_matrix};
use crate::backend::cpu::simd::{Element, Real};
use crate::backend::cpu::view::tensor;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

/// The rows `ids` (u32, `[..]`) of `weight` `[V, D]`: `[.., D]`; see the [module](self). Any float dtype; differentiable
/// in the weight.
///
/// # Errors
/// Shapes or dtypes that do not fit, an id that is not below V.
pub fn embedding(weight: &Tensor, ids: &Tensor) -> Result<Tensor> {
    if !weight.track_op() || weight.device().is_metal() {
        return embedding_reference(weight, ids);
    }
    let (width, values) = check(weight, ids)?;
    let y = rows(&weight.detach(), ids)?;
    let (runs, table) = (Runs::new(&values), weight.detach());
    let [y] = record("embedding", &[weight], [storage_of(&y)?], move |[dy]| {
        let Some(dy) = dy else { return Ok(vec![None]) };
        let dy = dy.reshape((runs.order.len(), width))?;
        Ok(vec![Some(gradient(&dy, &runs, &table)?)])
    })?;
    Ok(y)
}

/// D and the ids of a call that fits.
fn check(weight: &Tensor, ids: &Tensor) -> Result<(usize, Vec<u32>)> {
    let [vocabulary, width] = *weight.dims() else {
        return Err(Error::shape("embedding: weight", "[V, D]", weight.dims()));
    };
    if !weight.dtype().is_float() {
        return Err(Error::dtype("embedding: weight", "a float", weight.dtype()));
    }
    if ids.dtype() != DType::U32 {
        return Err(Error::dtype("embedding: ids", "u32", ids.dtype()));
    }
    let values = ids.flatten_all()?.to_vec1::<u32>()?;
    match values.iter().find(|&&id| id as usize >= vocabulary) {
        Some(id) => Err(Error::value("embedding: id", format!("below V = {vocabulary}"), id)),
        None => Ok((width, values)),
    }
}

/// The tokens by id.
struct Runs {
    /// Tokens in the order of their ids, those of one id in their own.
    order: Vec<u32>,
    /// The ids that occur, and where in `order` the tokens of each begin; last, their number.
    ids: Vec<u32>,
    starts: Vec<u32>,
}

impl Runs {
    fn new(ids: &[u32]) -> Self {
        let mut order: Vec<u32> = (0..ids.len() as u32).collect();
        order.sort_by_key(|&token| ids[token as usize]);
        let mut runs = Self { order, ids: vec![], starts: vec![] };
        for (place, &token) in runs.order.iter().enumerate() {
            let id = ids[token as usize];
            if runs.ids.last() != Some(&id) {
                runs.ids.push(id);
                runs.starts.push(place as u32);
            }
        }
        runs.starts.push(ids.len() as u32);
        runs
    }

    fn tokens(&self, run: usize) -> &[u32] {
        &self.order[self.starts[run] as usize..self.starts[run + 1] as usize]
    }
}

/// The gradient of `like`, `[V, D]`, from that of the rows, `[T, D]`.
fn gradient(dy: &Tensor, runs: &Runs, like: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return cuda::gradient(dy, runs, like);
    }
    let run = match dy.dtype() {
        DType::F32 => on_cpu::<f32>,
        DType::F64 => on_cpu::<f64>,
        DType::BF16 => on_cpu::<bf16>,
        DType::F16 => on_cpu::<f16>,
        other => return Err(Error::dtype("embedding: gradient", "f32, f64, bf16 or f16", other)),
    };
    run(dy, runs, like)
}

fn on_cpu<E: Element>(dy: &Tensor, runs: &Runs, like: &Tensor) -> Result<Tensor> {
    let (vocabulary, width) = like.dims2()?;
    let dy = as_matrix(dy)?;
    let held = Held::new(&dy);
    let dy: Matrix<E> = held.matrix()?;
    let mut gradient = vec![E::narrow(E::Real::ZERO); vocabulary * width];
    // the rows of the ids that occur, which are in order
    let mut rows = Vec::with_capacity(runs.ids.len());
    let mut rest = gradient.as_mut_slice();
    let mut next = 0;
    for &id in &runs.ids {
        let (row, after) = rest.split_at_mut((id as usize - next) * width).1.split_at_mut(width);
        rows.push(row);
        (rest, next) = (after, id as usize + 1);
    }
    rows.into_par_iter().enumerate().for_each(|(run, row)| {
        let mut sums = vec![E::Real::ZERO; width];
        for &token in runs.tokens(run) {
            sums.iter_mut().enumerate().for_each(|(i, sum)| *sum += dy.at(token as usize, i).widen());
        }
        row.iter_mut().zip(sums).for_each(|(to, sum)| *to = E::narrow(sum));
    });
    Ok(tensor(gradient, like.dims()))
}

#[cfg(test)]
mod tests {
    use super::Runs;

    #[test]
    fn tokens_come_by_id_and_in_order() {
        let runs = Runs::new(&[7, 2, 7, 0, 2, 7]);
        assert_eq!(
            (runs.ids.as_slice(), runs.starts.as_slice()),
            ([0, 2, 7].as_slice(), [0, 1, 3, 6].as_slice())
        );
        assert_eq!(runs.tokens(2), [0, 2, 5]);
        assert_eq!(Runs::new(&[]).starts, [0]);
    }
}
