//! The CUDA path: angles in fixed point, one read and one write; see `kernels/rotary.cu`.

use super::{Rotary, RotaryPair, RotaryStyle};
use crate::Result;
use crate::autograd::{Gradients, record_all};
use crate::backend::cuda::{
    Buffer, Element, Guards, Held, Launch, Module, Packed, device_of, with_unit_stride, within,
};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use std::f64::consts::TAU;

/// Threads of a block, and what the kernels have room for.
const THREADS: u32 = 256;
const MOST_PAIRS: usize = 256;
const MOST_HEADS: usize = 256;
/// Bytes of one access.
const ACCESS: usize = 16;

/// `struct Sequence` of `rotary.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Sequence {
    from: u64,
    to: u64,
    row: i64,
    token: i64,
    head: i64,
    heads: i64,
}

/// `struct Rotary` of `rotary.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Call {
    sequences: [Sequence; 2],
    positions: u64,
    log_decay: u64,
    first: i64,
    length: i32,
    width: i32,
    pairs: i32,
    shared: i32,
    back: i32,
    turns: [u64; MOST_PAIRS],
}

/// Turns of a position at an angle per position, in units of 2^-64; whole ones do not count.
pub(crate) fn turns_of(frequency: f64) -> u64 {
    ((frequency / TAU).rem_euclid(1.0) * 2f64.powi(64)) as u64
}

/// What all rows share.
#[derive(Clone, Debug)]
struct Turn {
    /// Of a position, in units of 2^-64.
    turns: [u64; MOST_PAIRS],
    pairs: usize,
    style: RotaryStyle,
    first: usize,
    /// `[L]` or `[B, L]` where positions are not `first` and so on in every row.
    positions: Option<Tensor>,
    /// `[H]` of the first sequence, f32.
    log_decay: Option<Tensor>,
    back: bool,
}

/// One sequence; `None` where no kernel takes it.
pub(super) fn one(args: &Rotary) -> Result<Option<Tensor>> {
    let turned = turned(args, &[args.x], None)?;
    Ok(turned.and_then(|all| all.into_iter().next()))
}

/// Queries and keys; `None` where no kernel takes them together.
pub(super) fn pair(args: &RotaryPair) -> Result<Option<(Tensor, Tensor)>> {
    let all = turned(&args.side(args.q), &[args.q, args.k], args.log_decay)?;
    Ok(all.and_then(|all| <[Tensor; 2]>::try_from(all).ok()).map(Into::into))
}

/// Sequences like `args`, the first one divided by the root of its sums of decays if there are any.
fn turned(args: &Rotary, sequences: &[&Tensor], log_decay: Option<&[f64]>) -> Result<Option<Vec<Tensor>>> {
    let (batch, length, _, _) = args.x.dims4()?;
    let heads = sequences[0].dims()[2];
    let alike = sequences.iter().all(|x| x.dtype() == args.x.dtype() && x.elem_count() > 0);
    let fits = args.frequencies.len() <= MOST_PAIRS && (log_decay.is_none() || heads <= MOST_HEADS);
    let few = batch * length <= i32::MAX as usize;
    let run = match args.x.dtype() {
        DType::F32 => recorded::<f32>,
        DType::BF16 => recorded::<bf16>,
        DType::F16 => recorded::<f16>,
        _ => return Ok(None),
    };
    if !(alike && fits && few) {
        return Ok(None);
    }
    let device = args.x.device();
    let mut turns = [0; MOST_PAIRS];
    for (turn, frequency) in turns.iter_mut().zip(args.frequencies) {
        *turn = turns_of(*frequency);
    }
    let first = args.positions.first().copied().unwrap_or(0);
    let in_order = args.positions.iter().enumerate().all(|(i, position)| *position == first + i % length)
        && (args.positions.len() == length || args.positions.len() == batch * length);
    let positions: Vec<i64> = args.positions.iter().map(|position| *position as i64).collect();
    let turn = Turn {
        turns,
        pairs: args.frequencies.len(),
        style: args.style,
        first,
        positions: if in_order {
            None
        } else {
            Some(Tensor::from_vec(positions, args.positions.len(), device)?)
        },
        log_decay: match log_decay {
            Some(logs) => {
                let logs: Vec<f32> = logs.iter().map(|log| *log as f32).collect();
                Some(Tensor::from_slice(&logs, logs.len(), device)?)
            }
            None => None,
        },
        back: false,
    };
    let what = || format!("rotary of {:?}", args.x.dims());
    within(what, run(sequences, turn)).map(Some)
}

fn recorded<E: Element>(sequences: &[&Tensor], turn: Turn) -> Result<Vec<Tensor>> {
    let plain: Vec<Tensor> = sequences.iter().map(|x| x.detach()).collect();
    let turned = turn.apply::<E>(&plain.iter().collect::<Vec<_>>())?;
    let device = device_of(sequences[0])?;
    let outputs = turned.into_iter().zip(sequences).map(|(y, x)| (y.storage(&device), x.shape().clone()));
    let shapes: Vec<_> = sequences.iter().map(|x| x.shape().clone()).collect();
    let (dtype, back) = (sequences[0].dtype(), Turn { back: true, ..turn });
    Ok(record_all("rotary", sequences, outputs.collect(), move |gradients| {
        let missing = |(gradient, shape): (&Option<Tensor>, &candle_core::Shape)| match gradient {
            Some(gradient) => Ok(gradient.clone()),
            None => Tensor::zeros(shape, dtype, &candle_core::Device::Cuda(device.clone())),
        };
        let given: Vec<Tensor> =
            gradients.iter().zip(&shapes).map(missing).collect::<candle_core::Result<_>>()?;
        let turned = back.apply::<E>(&given.iter().collect::<Vec<_>>())?;
        Ok(turned
            .into_iter()
            .zip(&shapes)
            .map(|(y, shape)| Some(y.tensor(&device, shape)))
            .collect::<Gradients>())
    })?)
}

impl Turn {
    fn apply<E: Element>(&self, sequences: &[&Tensor]) -> Result<Vec<Buffer<E>>> {
        let sequences: Vec<Tensor> = sequences.iter().map(|x| with_unit_stride(x)).collect::<Result<_>>()?;
        let (batch, length, _, width) = sequences[0].dims4()?;
        let device = &device_of(&sequences[0])?;
        let stream = device.cuda_stream();
        let mut buffers: Vec<Buffer<E>> =
            sequences.iter().map(|x| Buffer::new(device, x.elem_count())).collect::<Result<_>>()?;
        let held: Vec<Held> = sequences.iter().map(Held::new).collect();
        let [positions, log_decay] = [&self.positions, &self.log_decay].map(|x| x.as_ref().map(Held::new));
        {
            let guards = &mut Guards::default();
            let mut call = Call {
                sequences: [Sequence::default(); 2],
                positions: 0,
                log_decay: 0,
                first: self.first as i64,
                length: length as i32,
                width: width as i32,
                pairs: self.pairs as i32,
                shared: (self.positions.as_ref().is_some_and(|p| p.elem_count() == length)) as i32,
                back: self.back as i32,
                turns: self.turns,
            };
            if let Some(positions) = &positions {
                call.positions = positions.pointer("rotary: positions", device, &stream, guards)?;
            }
            if let Some(log_decay) = &log_decay {
                call.log_decay = log_decay.pointer("rotary: log_decay", device, &stream, guards)?;
            }
            let per_access = ACCESS / size_of::<E>();
            let whole = match self.style {
                RotaryStyle::Half => self.pairs,
                RotaryStyle::Interleaved => 2 * self.pairs,
            };
            let mut aligned = whole.is_multiple_of(per_access) && width.is_multiple_of(per_access);
            for (sequence, ((x, held), y)) in
                call.sequences.iter_mut().zip(sequences.iter().zip(&held).zip(&mut buffers))
            {
                let [row, token, head] = [0, 1, 2].map(|i| x.stride()[i] as i64);
                let from = held.pointer("rotary: x", device, &stream, guards)?;
                let to = y.pointer(&stream, guards);
                *sequence = Sequence { from, to, row, token, head, heads: x.dim(2)? as i64 };
                let steps = [row, token, head].map(|step| step as usize);
                aligned &=
                    from.is_multiple_of(ACCESS as u64) && steps.iter().all(|n| n.is_multiple_of(per_access));
            }
            let accesses = if aligned { "pieces" } else { "pairs" };
            let style = match self.style {
                RotaryStyle::Half => "half",
                RotaryStyle::Interleaved => "interleaved",
            };
            let launch = Launch {
                what: "rotary",
                device,
                module: Module::Rotary,
                kernel: &format!("rotary_{}_{accesses}_{style}", E::NAME),
                grid: [batch * length, 1, 1],
                threads: THREADS,
                dynamic: false,
            };
            // SAFETY: pointers and steps of tensors whose shapes were checked, and buffers of the same shapes.
            unsafe { launch.run(&[&Packed(call)])? };
        }
        Ok(buffers)
    }
}
