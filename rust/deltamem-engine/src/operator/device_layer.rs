//! The operator `deltamem:DeviceMemoryLayer`: one node for all that a decoder's layer does for its memory, on a card. It has the inputs, outputs and
//! attributes of `deltamem:MemoryLayer`, but for spans, norms of heads and `storage`, and a last output `work` that ONNX Runtime plans
//! and nobody reads; the decoder's tensors are in its own type, the memory and its weights in float32. What it computes is
//! [`deltamem_cuda`]'s; here are the tensors' addresses and sizes. Nodes are placed by `deltamem_export.fused`.

use std::sync::Arc;

use deltamem_cuda::{Address, Call, Correction, Element, Layer, Machine, Rows, Sizes, Target, Values};
use deltamem_kernel::{From, Storage};
use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType;

use super::tensors::{Placed, Tensors};
use super::{
    CORRECTIONS, DELTA_O_NORM, GATE_BIAS, HIDDEN, MOST_TARGETS, NETWORKS, Node, OUTPUT_O, PAST_MEMORY,
    PRESENT_MEMORY, Q, WRITE_MASK, card, guarded, made, text,
};
use crate::device::provider::{CUDA, Provider};

const INPUTS: usize = DELTA_O_NORM + 1;
const WORK: usize = OUTPUT_O + 1;
const OUTPUTS: usize = WORK + 1;

const FLOAT: TensorElementType = TensorElementType::Float32;

/// What helps where the kernels cannot be had.
const HELP: &str = "load with graph=\"portable\"";

/// The operator for decoders of one type of numbers.
pub(super) struct DeviceMemoryLayer {
    element: Element,
    provider: Provider,
}

impl DeviceMemoryLayer {
    /// One for each type.
    pub(super) fn all(provider: Provider) -> [Self; 3] {
        [Element::Single, Element::Half, Element::Brain].map(|element| Self { element, provider })
    }

    /// The decoder's type.
    fn kind(&self) -> TensorElementType {
        match self.element {
            Element::Single => FLOAT,
            Element::Half => TensorElementType::Float16,
            Element::Brain => TensorElementType::Bfloat16,
        }
    }
}

impl Operator for DeviceMemoryLayer {
    type Kernel<'attr> = DeviceKernel;

    // Where nobody else reads a projection or the residual, it is corrected where it lies.
    const INPLACES: &[(u32, u32)] = &[(6, 1), (7, 2), (8, 3), (9, 4)];

    fn name(&self) -> &'static str {
        "DeviceMemoryLayer"
    }

    fn versions(&self) -> std::ops::RangeInclusive<u32> {
        1..=1
    }

    fn execution_provider_type(&self) -> Option<&str> {
        match self.provider {
            Provider::Cuda { .. } => Some(CUDA),
            Provider::Host => None,
        }
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        (0..INPUTS).map(|n| match n {
            HIDDEN => OperatorInput::required(self.kind()),
            DELTA_O_NORM => OperatorInput::optional(FLOAT),
            _ if n < Q => OperatorInput::required(FLOAT),
            _ => OperatorInput::optional(self.kind()),
        })
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        (0..OUTPUTS).map(|n| match n {
            PRESENT_MEMORY | WORK => OperatorOutput::required(FLOAT),
            _ => OperatorOutput::optional(self.kind()),
        })
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<DeviceKernel> {
        let kernel = || DeviceKernel::new(context, self.element, self.kind(), self.provider);
        made(context, "the memory's node on the card", kernel, HELP)
    }
}

/// One node's layer.
pub(super) struct DeviceKernel {
    layer: Layer,
    kind: TensorElementType,
    /// Which of the memory's layers it is.
    at: usize,
    /// Each target's output, and the input that it is made from.
    places: Vec<(usize, Option<usize>)>,
    on_card: bool,
    /// Where the next node's kernels are had; the layer's are its own.
    _machine: Arc<Machine>,
}

impl DeviceKernel {
    fn new(
        context: &KernelContext<'_>,
        element: Element,
        kind: TensorElementType,
        provider: Provider,
    ) -> Result<Self, String> {
        let node = Node(context);
        let settings = node.settings_in(Storage::Single)?;
        let sizes = Sizes {
            heads: settings.heads,
            rank: settings.rank,
            mode: settings.mode,
            gates: settings.gates,
            own_lambda: settings.own_lambda,
            normalize_qk: settings.normalize_qk,
            element,
        };
        let epsilon = context.get::<f32>("delta_o_epsilon");
        let (mut targets, mut places) = (Vec::new(), Vec::new());
        for place in node.places()? {
            places.push((place.output, place.input));
            targets.push(Target {
                width: place.width,
                rows: match place.from {
                    From::Nothing => None,
                    From::Rows { stride, start } => Some(Rows { stride, start }),
                },
                corrections: place
                    .corrections
                    .iter()
                    .map(|&[from, width, start]| Correction { from, width, start })
                    .collect(),
                epsilon: epsilon.filter(|_| place.output == OUTPUT_O),
            });
        }
        let machine = card::machine(provider)?;
        let kernels = machine.kernels(sizes).map_err(text)?;
        Ok(Self {
            layer: Layer::new(kernels, targets).map_err(text)?,
            kind,
            at: node.size("layer")?,
            places,
            on_card: matches!(provider, Provider::Cuda { .. }),
            _machine: machine,
        })
    }

    #[allow(unsafe_code)]
    fn forward(&self, context: &ComputeContext) -> Result<(), String> {
        let tensors = Tensors::new(context);
        let sizes = *self.layer.kernels().sizes();
        let (heads, rank) = (sizes.heads, sizes.rank);
        let hidden = tensors.placed(HIDDEN, "hidden", self.kind)?;
        let &[batch, tokens, width] = hidden.shape() else {
            return Err(format!(
                "hidden is {:?}, expected [batch, tokens, width]",
                hidden.shape()
            ));
        };
        let mask = tensors
            .placed(WRITE_MASK, "write_mask", FLOAT)?
            .expect(&[batch, tokens])?;
        let past = tensors.placed(PAST_MEMORY, "past_memory", FLOAT)?;
        let layers = past.shape().get(1).copied().unwrap_or(0);
        let past = past.expect(&[batch, layers, heads, rank, rank])?;
        if self.at >= layers {
            return Err(format!(
                "past_memory has {layers} layers, this node is layer {}",
                self.at
            ));
        }
        let networks = tensors
            .placed(NETWORKS, "networks", FLOAT)?
            .expect(&[width, sizes.proposal_width()])?;
        let gate_bias = tensors
            .placed(GATE_BIAS, "gate_bias", FLOAT)?
            .expect_count(sizes.logits())?;
        let corrections = tensors.placed(CORRECTIONS, "corrections", FLOAT)?;
        let columns = corrections.count() / sizes.reads();
        let corrections = corrections.expect(&[sizes.reads(), columns])?;
        let present = tensors.placed_output(PRESENT_MEMORY, &[batch, 1, heads, rank, rank], FLOAT)?;
        let room = self
            .layer
            .work(batch, tokens, width)
            .ok_or_else(|| format!("hidden is [{batch}, {tokens}, {width}], which is too large"))?;
        let work = tensors.placed_output(WORK, &[room], FLOAT)?;
        let mut values = [Values::default(); MOST_TARGETS];
        for ((values, target), &(output, input)) in
            values.iter_mut().zip(self.layer.targets()).zip(&self.places)
        {
            *values = self.values(&tensors, target, output, input, [batch, tokens])?;
        }
        // The card's context is the provider's; where the processor plays the card there is no stream.
        let stream = if self.on_card {
            context
                .stream()
                .map_err(text)?
                .map_or(0, |stream| stream.as_ptr() as usize)
        } else {
            0
        };
        let address = |tensor: &Placed| -> Address { tensor.address() };
        let call = Call {
            batch,
            tokens,
            width,
            columns,
            layers,
            layer: self.at,
            hidden: address(&hidden),
            write_mask: address(&mask),
            past_memory: address(&past),
            networks: address(&networks),
            gate_bias: address(&gate_bias),
            corrections: address(&corrections),
            present_memory: address(&present),
            work: address(&work),
            values: &values[..self.places.len()],
            stream,
        };
        // SAFETY: ONNX Runtime has put all of these where the provider's kernels read and write, in the sizes that were just checked, and keeps
        // them until its stream is behind this call. It writes none of them meanwhile; an output that it laid over an input is one of
        // those that `INPLACES` names.
        unsafe { self.layer.forward(&call) }.map_err(text)
    }

    /// Where a target's rows lie before and after.
    fn values(
        &self,
        tensors: &Tensors<'_>,
        target: &Target,
        output: usize,
        input: Option<usize>,
        [batch, tokens]: [usize; 2],
    ) -> Result<Values, String> {
        let source = match (input, target.rows) {
            (Some(input), Some(rows)) => tensors
                .placed(input, "a projection or the residual", self.kind)?
                .expect(&[batch, tokens, rows.stride])?
                .address(),
            _ => 0,
        };
        let norm = match (target.epsilon, target.corrections.first()) {
            (Some(_), Some(own)) => tensors
                .placed(DELTA_O_NORM, "delta_o_norm", FLOAT)?
                .expect_count(own.width)?
                .address(),
            _ => 0,
        };
        let out = tensors
            .placed_output(output, &[batch, tokens, target.width], self.kind)?
            .address();
        Ok(Values { out, source, norm })
    }
}

impl Kernel for DeviceKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        guarded(|| {
            self.forward(context)
                .map_err(|what| ort::Error::new(format!("the memory's node on the card: {what}")))
        })
    }
}
