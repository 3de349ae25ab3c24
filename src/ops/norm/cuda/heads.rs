//! The norm of a head and the gate behind it; see `kernels/norm_heads.cu`.

use super::{ACCESS, LANES, MOST, THREADS, add_shares};
use crate::Result;
use crate::autograd::{Gradients, record};
use crate::backend::cuda::{
    Buffer, Element, Guards, Held, Launch, Module, Packed, contiguous, device_of, multiprocessors, within,
};
use crate::ops::norm::{Norm, NormInput, NormKind};
use candle_core::{DType, Tensor};
use half::{bf16, f16};

/// Blocks of a pass for each multiprocessor; fewer where each leaves shares of the gradients of weight and bias.
const BLOCKS: usize = 8;
const SHARING_BLOCKS: usize = 2;

/// Which kernel takes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Lanes that share a row, and accesses of each.
    team: usize,
    items: usize,
}

impl Plan {
    /// For heads of `width` numbers of `bytes` each; `None` if they are too wide, or not of whole accesses.
    fn new(width: usize, bytes: usize) -> Option<Self> {
        let numbers = ACCESS / bytes;
        let kernels = [(8, 1), (16, 1), (LANES, 1), (LANES, 2), (LANES, 4)];
        let most = if bytes == 2 { 4 } else { 5 };
        let fits = |(team, items): &(usize, usize)| team * items * numbers >= width;
        let (team, items) = kernels.into_iter().take(most).find(fits)?;
        width.is_multiple_of(numbers).then_some(Self { team, items })
    }

    fn rows_of_a_block(&self) -> usize {
        THREADS / self.team
    }
}

/// `struct HeadNorm` of `norm_heads.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Call {
    x: u64,
    z: u64,
    dy: u64,
    y: u64,
    dx: u64,
    dz: u64,
    weight: u64,
    bias: u64,
    shares: u64,
    rows: i64,
    width: i32,
    layer: i32,
    outside: i32,
    eps: f32,
}

/// The arguments, detached and contiguous, parameters in f32.
struct Saved {
    name: &'static str,
    x: Tensor,
    z: Tensor,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    kind: NormKind,
    eps: f64,
    plan: Plan,
}

/// A gated norm of checked arguments, the gate behind the norm; `None` where these kernels do not take it.
pub(super) fn on_cuda(
    name: &'static str,
    input: &NormInput,
    norm: &Norm,
    group: usize,
) -> Result<Option<Tensor>> {
    let Some(z) = input.z.filter(|_| input.norm_before_gate && input.residual.is_none()) else {
        return Ok(None);
    };
    let width = input.x.dims().last().copied().unwrap_or(1);
    let Some(plan) = Plan::new(width, input.x.dtype().size_in_bytes()) else { return Ok(None) };
    if group != width || width > MOST || input.x.elem_count() == 0 {
        return Ok(None);
    }
    let run = match input.x.dtype() {
        DType::F32 => recorded::<f32>,
        DType::BF16 => recorded::<bf16>,
        DType::F16 => recorded::<f16>,
        _ => return Ok(None),
    };
    let wide = |x: Option<&Tensor>| x.map(|x| contiguous(&x.detach().to_dtype(DType::F32)?)).transpose();
    let saved = Saved {
        name,
        x: contiguous(&input.x.detach())?,
        z: contiguous(&z.detach())?,
        weight: wide(norm.weight)?,
        bias: wide(norm.bias)?,
        kind: norm.kind,
        eps: norm.eps,
        plan,
    };
    let mut inputs = vec![input.x, z];
    inputs.extend([norm.weight, norm.bias].into_iter().flatten());
    run(saved, &inputs).map(Some)
}

fn recorded<E: Element>(saved: Saved, inputs: &[&Tensor]) -> Result<Tensor> {
    let (device, shape) = (device_of(&saved.x)?, saved.x.shape().clone());
    let dtypes: Vec<DType> = inputs.iter().map(|x| x.dtype()).collect();
    let y = within(|| saved.what(""), saved.forward::<E>())?;
    let [y] = record(saved.name, inputs, [(y.storage(&device), shape)], move |[dy]| {
        let Some(dy) = dy else { return Ok(vec![None; dtypes.len()]) };
        let gradients = within(|| saved.what(", backward"), saved.backward::<E>(dy))?;
        let own = |(gradient, dtype): (Tensor, &DType)| gradient.to_dtype(*dtype).map(Some);
        gradients.into_iter().zip(&dtypes).map(own).collect::<candle_core::Result<Gradients>>()
    })?;
    Ok(y)
}

impl Saved {
    fn what(&self, pass: &str) -> String {
        format!("{} of {:?}{pass}", self.name, self.x.dims())
    }

    fn width(&self) -> usize {
        self.x.dims().last().copied().unwrap_or(1)
    }

    fn rows(&self) -> usize {
        self.x.elem_count() / self.width()
    }

    fn affine(&self) -> &'static str {
        match (&self.weight, &self.bias) {
            (_, Some(_)) => "affine",
            (Some(_), None) => "weight",
            (None, None) => "plain",
        }
    }

    fn forward<E: Element>(&self) -> Result<Buffer<E>> {
        let device = &device_of(&self.x)?;
        let mut y = Buffer::<E>::new(device, self.x.elem_count())?;
        let blocks = multiprocessors(device)? * BLOCKS;
        // SAFETY: the buffer has the shape of x.
        unsafe { self.launch::<E>("fwd", blocks, None, [Some(&mut y), None, None], None)? };
        Ok(y)
    }

    /// The gradients of x, z, and as far as they are there weight and bias.
    fn backward<E: Element>(&self, dy: &Tensor) -> Result<Vec<Tensor>> {
        let device = &device_of(&self.x)?;
        let (elements, width, shape) = (self.x.elem_count(), self.width(), self.x.shape());
        let (mut dx, mut dz) = (Buffer::<E>::new(device, elements)?, Buffer::<E>::new(device, elements)?);
        let sharing = self.weight.is_some() || self.bias.is_some();
        let most = multiprocessors(device)? * if sharing { SHARING_BLOCKS } else { BLOCKS };
        let blocks = most.min(self.rows().div_ceil(self.plan.rows_of_a_block()));
        let size = 2 * width;
        let mut shares = Buffer::<f32>::new(device, if sharing { blocks * size } else { 1 })?;
        let made = [None, Some(&mut dx), Some(&mut dz)];
        let dy = contiguous(dy)?;
        // SAFETY: the buffers have the shape of x, and room for the shares of every block.
        unsafe { self.launch::<E>("bwd", blocks, Some(&dy), made, Some(&mut shares))? };
        let mut gradients = vec![dx.tensor(device, shape), dz.tensor(device, shape)];
        if !sharing {
            return Ok(gradients);
        }
        let mut total = Buffer::<f32>::new(device, size)?;
        let stream = device.cuda_stream();
        {
            let guards = &mut Guards::default();
            let (to, from) = (total.pointer(&stream, guards), shares.pointer(&stream, guards));
            // SAFETY: `blocks` shares of `size` numbers, and room for their sum.
            unsafe { add_shares(self.name, device, to, from, blocks, size)? };
        }
        let total = total.tensor(device, (2, width));
        for (row, parameter) in [(0, &self.weight), (1, &self.bias)] {
            if parameter.is_some() {
                gradients.push(total.get(row)?);
            }
        }
        Ok(gradients)
    }

    /// # Safety
    /// `made`, y, dx and dz, have as many elements as x, as far as the pass fills them, and `shares` two rows for each block.
    unsafe fn launch<E: Element>(
        &self,
        pass: &str,
        most: usize,
        dy: Option<&Tensor>,
        made: [Option<&mut Buffer<E>>; 3],
        shares: Option<&mut Buffer<f32>>,
    ) -> Result<()> {
        let device = &device_of(&self.x)?;
        let stream = device.cuda_stream();
        let read = [Some(&self.x), Some(&self.z), dy, self.weight.as_ref(), self.bias.as_ref()];
        let held = read.map(|x| x.map(Held::new));
        let guards = &mut Guards::default();
        let mut pointers = [0; 5];
        for (pointer, held) in pointers.iter_mut().zip(&held) {
            if let Some(held) = held {
                *pointer = held.pointer(self.name, device, &stream, guards)?;
            }
        }
        let [x, z, dy, weight, bias] = pointers;
        let [y, dx, dz] = made.map(|buffer| buffer.map_or(0, |buffer| buffer.pointer(&stream, guards)));
        let call = Call {
            x,
            z,
            dy,
            y,
            dx,
            dz,
            weight,
            bias,
            shares: shares.map_or(0, |shares| shares.pointer(&stream, guards)),
            rows: self.rows() as i64,
            width: self.width() as i32,
            layer: (self.kind == NormKind::Layer) as i32,
            outside: (self.kind == NormKind::RmsOutside) as i32,
            eps: self.eps as f32,
        };
        let Plan { team, items } = self.plan;
        let launch = Launch {
            what: self.name,
            device,
            module: Module::NormHeads,
            kernel: &format!("norm_heads_{pass}_{}_{team}_{items}_{}", E::NAME, self.affine()),
            grid: [most.min(self.rows().div_ceil(self.plan.rows_of_a_block())).max(1), 1, 1],
            threads: THREADS as u32,
            dynamic: false,
        };
        // SAFETY: the kernel takes one `HeadNorm`; the caller vouches for the buffers, the rest are tensors of checked shapes.
        unsafe { launch.run(&[&Packed(call)]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_to_as_few_lanes_as_hold_them() {
        let plan = |width, bytes| Plan::new(width, bytes).map(|plan| (plan.team, plan.items));
        assert_eq!(plan(64, 2), Some((8, 1)));
        assert_eq!(plan(128, 2), Some((16, 1)));
        assert_eq!(plan(512, 2), Some((32, 2)));
        assert_eq!(plan(512, 4), Some((32, 4)));
        assert_eq!(plan(520, 2), None);
        assert_eq!(plan(60, 2), None);
        assert_eq!(plan(60, 4), Some((16, 1)));
    }
}
