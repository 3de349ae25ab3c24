//! stub
use super::LongConv;
use crate::Result;
use candle_core::Tensor;
/// x
#[derive(Clone, Debug)]
pub struct LongConvState;
/// x
pub fn long_conv_with_state(args: &LongConv, _: &mut LongConvState) -> Result<Tensor> {
    super::long_conv(args)
}
