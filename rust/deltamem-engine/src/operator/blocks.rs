//! The operator `deltamem:MatMulNBits`: `com.microsoft:MatMulNBits` at accuracy level 4, with the same inputs and attributes, for the shapes
//! that [`deltamem_kernel::Blocks`] has. `deltamem_export.fused` places it where ONNX Runtime's own one stands.

use std::sync::Arc;

use deltamem_kernel::{Bits, BlockShape, Blocks, IntegerInstructions, Rounded};
use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::{TensorElementType, TensorValueType};

use super::pages::give_back;
use super::tensors::{MOST_SIZES, Tensors};
use super::{Node, Shared, guarded, made, text, with_threads};

const X: usize = 0;
const WEIGHTS: usize = 1;
const SCALES: usize = 2;

#[derive(Default)]
pub(super) struct MatMulNBits {
    rounded: Shared<Rounded>,
}

impl Operator for MatMulNBits {
    type Kernel<'attr> = BlocksKernel;

    fn name(&self) -> &'static str {
        "MatMulNBits"
    }

    fn versions(&self) -> std::ops::RangeInclusive<u32> {
        1..=1
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Uint8),
            OperatorInput::required(TensorElementType::Float32),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<BlocksKernel> {
        let kernel = || BlocksKernel::new(context, &self.rounded);
        made(context, "the product", kernel, "load with graph=\"portable\"")
    }
}

/// One node's matrix.
pub(super) struct BlocksKernel {
    matrix: Blocks,
    rounded: Shared<Rounded>,
}

impl BlocksKernel {
    fn new(context: &KernelContext<'_>, rounded: &Shared<Rounded>) -> Result<Self, String> {
        let node = Node(context);
        let instructions = IntegerInstructions::best()
            .ok_or("this processor has no instructions for it that are worth it")?;
        let bits = match node.size("bits")? {
            4 => Bits::Four,
            8 => Bits::Eight,
            found => return Err(format!("the attribute bits is {found}, expected 4 or 8")),
        };
        let shape = BlockShape {
            inner: node.size("K")?,
            columns: node.size("N")?,
            block: node.size("block_size")?,
            bits,
        };
        let weights = context
            .constant_input::<TensorValueType<u8>>(WEIGHTS)
            .map_err(|error| format!("the weights are no constant of bytes: {error}"))?;
        let scales = context
            .constant_input::<TensorValueType<f32>>(SCALES)
            .map_err(|error| format!("the scales are no constant of float32: {error}"))?;
        let (weights, scales) = (weights.extract_tensor().1, scales.extract_tensor().1);
        let matrix = Blocks::pack(weights, scales, shape, instructions).map_err(text)?;
        give_back(weights);
        give_back(scales);
        Ok(Self {
            matrix,
            rounded: Arc::clone(rounded),
        })
    }
}

impl Kernel for BlocksKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        guarded(|| {
            with_threads(context, |pool| {
                let tensors = Tensors::new(context);
                let x = tensors.input(X, "x")?;
                let BlockShape { inner, columns, .. } = self.matrix.shape();
                let mut sizes = [0; MOST_SIZES];
                let dims = x.shape().len();
                sizes[..dims].copy_from_slice(x.shape());
                match sizes[..dims].last_mut() {
                    Some(last) if *last == inner => *last = columns,
                    _ => return Err(format!("x is {:?}, expected [..., {inner}]", x.shape())),
                }
                let out = tensors.output(0, &sizes[..dims])?;
                self.matrix
                    .multiply(x.values(), out, &mut self.rounded.lock(), pool)
                    .map_err(text)
            })
            .map_err(|what| ort::Error::new(format!("a product's node: {what}")))
        })
    }
}
