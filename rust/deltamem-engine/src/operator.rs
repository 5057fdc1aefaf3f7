//! The runtime's own operators. This one is `deltamem:MemoryLayer`: one node for all that a decoder's layer does for its memory, on the
//! processor (on a card: [`device_layer`]). It reads a node's attributes and
//! constants once, when ONNX Runtime makes its kernel, and then hands each call's tensors to [`deltamem_kernel`], which computes. The nodes
//! are placed by `deltamem_export.fused`, where each input and attribute is described; a test runs its graphs against the portable ones.

mod blocks;
mod card;
mod device_layer;
mod pages;
mod tensors;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use deltamem_core::{Gates, UpdateMode};
use deltamem_kernel::{
    Call, Correction, From, HeadNorm, Instructions, IntegerInstructions, Layer, Pool, Scratch, Settings,
    Spans, Storage, Target, Values,
};
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
};
use ort::value::{TensorElementType, TensorValueType};
use parking_lot::Mutex;

use self::tensors::Tensors;
use crate::device::provider::Provider;

pub use self::card::examine_kernels;
pub(crate) use self::card::prepare;

/// The domain that the operator stands in.
const DOMAIN: &str = "deltamem";

/// Inputs. Those from `Q` on are there where a node has a use for them.
const HIDDEN: usize = 0;
const WRITE_MASK: usize = 1;
const PAST_MEMORY: usize = 2;
const NETWORKS: usize = 3;
const GATE_BIAS: usize = 4;
const CORRECTIONS: usize = 5;
const Q: usize = 6;
const RESIDUAL: usize = 9;
const DELTA_O_NORM: usize = 10;
const Q_NORM: usize = 11;
const SPAN_WEIGHTS: usize = 13;
const SPAN_MASK: usize = 14;
const PAST_SPANS: usize = 15;
const INPUTS: usize = 16;

/// Outputs: the layer's memory, then q, k, v and o (or the residual with Δo in it), then what its spans have gathered.
const PRESENT_MEMORY: usize = 0;
const OUTPUT_O: usize = 4;
const PRESENT_SPANS: usize = 5;
const OUTPUTS: usize = 6;

/// The most values that one layer corrects.
const MOST_TARGETS: usize = 4;

/// The domain with its operators, for one session; where the session is for a device, with those for it.
pub(crate) fn domain(provider: Option<Provider>) -> ort::Result<OperatorDomain> {
    let mut domain = OperatorDomain::new(DOMAIN)?
        .add(MemoryLayer::default())?
        .add(blocks::MatMulNBits::default())?;
    if let Some(provider) = provider {
        for operator in device_layer::DeviceMemoryLayer::all(provider) {
            domain = domain.add(operator)?;
        }
    }
    Ok(domain)
}

/// The vector instructions that the operator computes with on this processor.
pub fn kernel_instructions() -> &'static str {
    Instructions::best().as_str()
}

/// The instructions that products of weights in blocks are made with on this processor; none where ONNX Runtime's own are taken.
pub fn product_instructions() -> Option<&'static str> {
    IntegerInstructions::best().map(IntegerInstructions::as_str)
}

#[derive(Default)]
struct MemoryLayer {
    scratch: Shared<Scratch>,
}

/// What all nodes of a session work in: they run one after another, so that one's room serves all, and is in the caches when the next one
/// comes.
type Shared<T> = Arc<Mutex<T>>;

impl Operator for MemoryLayer {
    type Kernel<'attr> = MemoryKernel;

    // Where nobody else reads a projection or the residual, it is corrected where it lies.
    const INPLACES: &[(u32, u32)] = &[(6, 1), (7, 2), (8, 3), (9, 4)];

    fn name(&self) -> &'static str {
        "MemoryLayer"
    }

    fn versions(&self) -> std::ops::RangeInclusive<u32> {
        1..=1
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        (0..INPUTS).map(|n| {
            if n < Q {
                OperatorInput::required(TensorElementType::Float32)
            } else {
                OperatorInput::optional(TensorElementType::Float32)
            }
        })
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        (0..OUTPUTS).map(|n| {
            if n == PRESENT_MEMORY {
                OperatorOutput::required(TensorElementType::Float32)
            } else {
                OperatorOutput::optional(TensorElementType::Float32)
            }
        })
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<MemoryKernel> {
        let kernel = || MemoryKernel::new(context, &self.scratch);
        made(context, "the memory's node", kernel, "export the bundle again")
    }
}

/// One node's layer.
struct MemoryKernel {
    layer: Layer,
    /// Which of the memory's layers it is.
    at: usize,
    /// Each target's output, and the input that it is made from.
    places: Vec<(usize, Option<usize>)>,
    spans: bool,
    scratch: Shared<Scratch>,
}

impl MemoryKernel {
    fn new(context: &KernelContext<'_>, scratch: &Shared<Scratch>) -> Result<Self, String> {
        let node = Node(context);
        let settings = node.settings()?;
        let networks = node.constant(NETWORKS, "networks")?;
        let gate_bias = node.constant(GATE_BIAS, "gate_bias")?;
        let hidden = networks.len() / settings.proposal_width().max(1);
        let settings = Settings { hidden, ..settings };
        let (targets, places) = node.targets(&settings)?;
        let layer =
            Layer::new(settings, &networks, &gate_bias, targets, Instructions::best()).map_err(text)?;
        // All of these are packed.
        for input in [NETWORKS, CORRECTIONS] {
            node.give_back(input);
        }
        Ok(Self {
            layer,
            at: node.size("layer")?,
            places,
            spans: context.get::<i64>("spans").unwrap_or(0) != 0,
            scratch: Arc::clone(scratch),
        })
    }

    fn forward(&mut self, context: &ComputeContext, pool: &Threads<'_>) -> Result<(), String> {
        let tensors = Tensors::new(context);
        let settings = *self.layer.settings();
        let (heads, rank) = (settings.heads, settings.rank);
        let hidden = tensors.input(HIDDEN, "hidden")?;
        let &[batch, tokens, width] = hidden.shape() else {
            return Err(format!(
                "hidden is {:?}, expected [batch, tokens, {}]",
                hidden.shape(),
                settings.hidden
            ));
        };
        if width != settings.hidden {
            return Err(format!(
                "hidden is {:?}, expected [batch, tokens, {}]",
                hidden.shape(),
                settings.hidden
            ));
        }
        let mask = tensors
            .input(WRITE_MASK, "write_mask")?
            .expect(&[batch, tokens])?;
        let past = tensors.input(PAST_MEMORY, "past_memory")?;
        let layers = past.shape().get(1).copied().unwrap_or(0);
        let past = past.expect(&[batch, layers, heads, rank, rank])?;
        if self.at >= layers {
            return Err(format!(
                "past_memory has {layers} layers, this node is layer {}",
                self.at
            ));
        }
        let state = tensors.output(PRESENT_MEMORY, &[batch, 1, heads, rank, rank])?;
        take_layer(past.values(), layers, self.at, state, heads * rank * rank);

        let (span_weights, span_mask, gathered);
        let spans = if self.spans {
            let own = settings.proposal_width();
            let all = tensors.input(PAST_SPANS, "past_spans")?;
            let count = all.shape().get(1).copied().unwrap_or(0);
            let all = all.expect(&[batch, count, layers, own])?;
            span_weights = tensors
                .input(SPAN_WEIGHTS, "span_weights")?
                .expect(&[batch, count, tokens])?;
            span_mask = tensors.input(SPAN_MASK, "span_mask")?.expect(&[batch, count])?;
            gathered = tensors.output(PRESENT_SPANS, &[batch, count, 1, own])?;
            take_layer(all.values(), layers, self.at, gathered, own);
            Some(Spans {
                weights: span_weights.values(),
                mask: span_mask.values(),
                gathered,
            })
        } else {
            None
        };

        let mut values: [Values<'_>; MOST_TARGETS] = std::array::from_fn(|_| Values {
            out: &mut [],
            source: None,
        });
        for ((values, target), &(output, input)) in
            values.iter_mut().zip(self.layer.targets()).zip(&self.places)
        {
            let shape = [batch, tokens, target.width()];
            *values = match (input, target.from()) {
                (Some(input), From::Rows { stride, .. }) => {
                    let (source, out) = tensors.corrected(input, &[batch, tokens, stride], output, &shape)?;
                    Values { out, source }
                }
                _ => Values {
                    out: tensors.output(output, &shape)?,
                    source: None,
                },
            };
        }
        let call = Call {
            batch,
            tokens,
            hidden: hidden.values(),
            write_mask: mask.values(),
            state,
            values: &mut values[..self.places.len()],
            spans,
        };
        self.layer
            .forward(call, &mut self.scratch.lock(), pool)
            .map_err(text)
    }
}

impl Kernel for MemoryKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        guarded(|| {
            with_threads(context, |pool| self.forward(context, pool))
                .map_err(|what| ort::Error::new(format!("the memory's node: {what}")))
        })
    }
}

/// Layer `at` out of rows of `layers` of them, row after row.
fn take_layer(all: &[f32], layers: usize, at: usize, own: &mut [f32], width: usize) {
    for (row, own) in all.chunks_exact(layers * width).zip(own.chunks_exact_mut(width)) {
        own.copy_from_slice(&row[at * width..][..width]);
    }
}

/// ONNX Runtime's own threads.
struct Threads<'a> {
    context: &'a ComputeContext,
    failed: AtomicBool,
}

impl Pool for Threads<'_> {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        // A panic must not reach ONNX Runtime's threads.
        let failed = &self.failed;
        let one = |n| {
            if catch_unwind(AssertUnwindSafe(|| task(n))).is_err() {
                failed.store(true, Ordering::Relaxed);
            }
        };
        if self.context.par_for(tasks, 0, one).is_err() {
            (0..tasks).for_each(one);
        }
    }
}

/// Does a call's work with ONNX Runtime's threads; a mistake on one of them is an error of the call.
fn with_threads(
    context: &ComputeContext,
    work: impl FnOnce(&Threads<'_>) -> Result<(), String>,
) -> Result<(), String> {
    let pool = Threads {
        context,
        failed: AtomicBool::new(false),
    };
    work(&pool)?;
    if pool.failed.into_inner() {
        Err(MISTAKE.into())
    } else {
        Ok(())
    }
}

/// A node's attributes and constants.
struct Node<'a, 'attr>(&'a KernelContext<'attr>);

impl Node<'_, '_> {
    fn size(&self, name: &str) -> Result<usize, String> {
        let found: i64 = self
            .0
            .get(name)
            .ok_or_else(|| format!("the attribute {name} is missing"))?;
        usize::try_from(found).map_err(|_| format!("the attribute {name} is {found}, expected 0 or more"))
    }

    fn sizes(&self, name: &str) -> Result<Vec<usize>, String> {
        let found: Vec<i64> = self.0.get(name).unwrap_or_default();
        let sizes = found
            .iter()
            .map(|&n| usize::try_from(n))
            .collect::<Result<_, _>>();
        sizes.map_err(|_| format!("the attribute {name} is {found:?}, expected numbers of 0 or more"))
    }

    fn word<T>(&self, name: &str, words: &[(&str, T)]) -> Result<T, String>
    where
        T: Copy,
    {
        let found: String = self.0.get(name).unwrap_or_default();
        words
            .iter()
            .find(|(word, _)| *word == found)
            .map(|&(_, value)| value)
            .ok_or_else(|| {
                let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                format!(
                    "the attribute {name} is {found:?}, expected one of {}",
                    words.join(", ")
                )
            })
    }

    fn constant(&self, input: usize, name: &str) -> Result<Vec<f32>, String> {
        let value = self
            .0
            .constant_input::<TensorValueType<f32>>(input)
            .map_err(|error| format!("the input {name} is no constant of float32: {error}"))?;
        Ok(value.extract_tensor().1.to_vec())
    }

    /// Gives back the pages of a constant that nobody reads again.
    fn give_back(&self, input: usize) {
        if let Ok(value) = self.0.constant_input::<TensorValueType<f32>>(input) {
            pages::give_back(value.extract_tensor().1);
        }
    }

    /// All but the hidden width, which the networks tell.
    fn settings(&self) -> Result<Settings, String> {
        let storages = [("float32", Storage::Single), ("float16", Storage::Half)];
        self.settings_in(self.word("storage", &storages)?)
    }

    fn settings_in(&self, storage: Storage) -> Result<Settings, String> {
        let modes = [
            UpdateMode::Standard,
            UpdateMode::LambdaOutside,
            UpdateMode::NoLambda,
        ];
        let settings = Settings {
            hidden: 0,
            heads: self.size("heads")?,
            rank: self.size("rank")?,
            mode: self.word("update_mode", &modes.map(|mode| (mode.as_str(), mode)))?,
            gates: self.word(
                "gates",
                &[Gates::Row, Gates::Head].map(|gates| (gates.as_str(), gates)),
            )?,
            own_lambda: self.size("own_lambda")? != 0,
            normalize_qk: self.size("normalize_qk")? != 0,
            storage,
        };
        deltamem_core::Geometry::new(1, settings.heads, settings.rank).map_err(text)?;
        Ok(settings)
    }

    /// What each target is made from and where it goes, as the attributes say.
    fn places(&self) -> Result<Vec<Place>, String> {
        let (outputs, widths) = (self.sizes("outputs")?, self.sizes("widths")?);
        let (splits, corrections) = (self.sizes("splits")?, self.sizes("corrections")?);
        let ascending =
            outputs.is_sorted_by(|a, b| a < b) && outputs.iter().all(|&n| (1..=OUTPUT_O).contains(&n));
        if !ascending || outputs.len() != widths.len() {
            return Err(format!(
                "the attributes outputs and widths are {outputs:?} and {widths:?}, expected one width for each output"
            ));
        }
        if !(splits.is_empty() || splits.len() == 3) || corrections.len() % 4 != 0 {
            return Err(format!(
                "the attributes splits and corrections hold {} and {} numbers",
                splits.len(),
                corrections.len()
            ));
        }
        let residual = self.size("residual")? != 0;
        let one = |output: usize, width: usize| {
            let packed = !splits.is_empty() && output < OUTPUT_O;
            let (from, input) = if packed {
                let start = splits[..output - 1].iter().sum();
                (
                    From::Rows {
                        stride: splits.iter().sum(),
                        start,
                    },
                    Some(Q),
                )
            } else if output < OUTPUT_O || residual {
                (
                    From::Rows {
                        stride: width,
                        start: 0,
                    },
                    Some(if output < OUTPUT_O {
                        Q + output - 1
                    } else {
                        RESIDUAL
                    }),
                )
            } else {
                (From::Nothing, None)
            };
            let (own, _) = corrections.as_chunks::<4>();
            Place {
                output,
                width,
                from,
                input,
                corrections: own
                    .iter()
                    .filter(|numbers| numbers[0] == output)
                    .map(|&[_, from, width, start]| [from, width, start])
                    .collect(),
            }
        };
        Ok(outputs
            .iter()
            .zip(&widths)
            .map(|(&output, &width)| one(output, width))
            .collect())
    }

    /// The targets, and each one's output and input.
    #[allow(clippy::type_complexity)] // said in words above
    fn targets(&self, settings: &Settings) -> Result<(Vec<Target>, Vec<(usize, Option<usize>)>), String> {
        let matrix = self.constant(CORRECTIONS, "corrections")?;
        let stride = matrix.len() / settings.read_width().max(1);
        let own_norm = match self.0.get::<f32>("delta_o_epsilon") {
            Some(epsilon) => Some((self.constant(DELTA_O_NORM, "delta_o_norm")?, epsilon)),
            None => None,
        };
        let (mut targets, mut places) = (Vec::new(), Vec::new());
        for place in self.places()? {
            let Place { output, width, .. } = place;
            let own = place.corrections.iter().map(|&[from, width, start]| Correction {
                matrix: &matrix,
                stride,
                from,
                width,
                start,
                norm: own_norm
                    .as_ref()
                    .filter(|_| output == OUTPUT_O)
                    .map(|(weights, epsilon)| (weights.as_slice(), *epsilon)),
            });
            let norm = match ["q_epsilon", "k_epsilon"]
                .get(output - 1)
                .and_then(|name| self.0.get::<f32>(name))
            {
                Some(epsilon) => Some(HeadNorm {
                    weights: self.constant(Q_NORM + output - 1, "norm")?,
                    epsilon,
                }),
                None => None,
            };
            let own = own.collect::<Vec<_>>();
            targets.push(Target::new(settings, width, place.from, &own, norm).map_err(text)?);
            places.push((output, place.input));
        }
        Ok((targets, places))
    }
}

/// Where a target's rows come from and go, and what is laid on them.
struct Place {
    output: usize,
    width: usize,
    from: From,
    input: Option<usize>,
    /// Of each correction: its first column in the constant, its columns, where in the rows they are laid.
    corrections: Vec<[usize; 3]>,
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn text(error: impl std::error::Error) -> String {
    error.to_string()
}

/// What is said of a panic.
const MISTAKE: &str =
    "it stopped at a mistake of its own; please report it, and load with graph=\"portable\"";

/// A node's kernel, or an error that names the node and says what helps.
fn made<K>(
    context: &KernelContext<'_>,
    kind: &str,
    kernel: impl FnOnce() -> Result<K, String>,
    help: &str,
) -> ort::Result<K> {
    guarded(|| {
        kernel().map_err(|what| {
            let node = context.node_name().unwrap_or_default();
            ort::Error::new(format!("{kind} {node}: {what}; {help}"))
        })
    })
}

/// A panic must not reach ONNX Runtime: it would end the process.
fn guarded<T>(work: impl FnOnce() -> ort::Result<T>) -> ort::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(ort::Error::new(format!("an operator of deltamem: {MISTAKE}"))))
}
