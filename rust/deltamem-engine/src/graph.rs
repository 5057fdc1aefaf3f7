//! A bundle's graph in ONNX Runtime: it is held against the manifest when it is opened, and runs: a chunk of one turn, or a token
//! of each of several. It knows the names and shapes of docs/bundle.md; it knows nothing of whose tokens it runs, nor of what comes before and
//! after them.

use std::ffi::CString;
use std::sync::Arc;

use ort::session::{Session as OnnxSession, builder::GraphOptimizationLevel};
use ort::value::{Outlet, TensorElementType, ValueType};

use crate::buffer::{Home, Part};
use crate::bundle::{Bundle, ElementType, Manifest};
use crate::call::{As, Call, Element, Tensor};
use crate::captures::{Captures, Packed};
use crate::device::DeviceBuffer;
use crate::error::{EngineError, Result};
use crate::kv::KvTensor;
use crate::memory::{Numbers, NumbersMut};
use crate::model::{LoadOptions, Model, runs_on};
use crate::operator;
use crate::runtime::Runtime;
use crate::turn::TurnTensors;

/// Names the files that ONNX Runtime writes its profile into, one for each graph when its model is let go; for finding out where time goes.
const PROFILE: &str = "DELTAMEM_PROFILE";

/// How long a thread of ONNX Runtime's looks for more work before it sleeps. Between two nodes of a step the next work comes within a few
/// microseconds, and waking a thread takes tens (decode is 1.1 to 1.4 times as fast as without, as with any longer time); a model that is
/// idle, or that shares its cores, loses no more than this.
const SPIN_US: &str = "20";

/// One graph in ONNX Runtime, and the small inputs of a run that are the same for every session.
#[derive(Debug)]
pub(crate) struct Graph {
    /// How steps are captured, where they are. Its thread ends before the session does.
    captures: Option<Captures>,
    session: OnnxSession,
    mask: Vec<i64>,
    positions: Vec<i64>,
    rows: Vec<i64>,
    write: Vec<f32>,
    strength: Vec<f32>,
    span_mask: Vec<f32>,
    /// Whether this is the measured graph.
    measured: bool,
}

/// Which rows of logits a run is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows<'a> {
    /// Every token's.
    All,
    /// The last token's of the last turn.
    Last,
    /// These.
    These(&'a [i64]),
}

/// One run: T tokens of each of B turns, what they read and where the results go.
pub(crate) struct Run<'a> {
    /// Token ids, checked, row after row, [B, T].
    pub(crate) tokens: &'a [i32],
    /// Each turn's tokens before these, [B].
    pub(crate) past: &'a [usize],
    /// Whether each turn's tokens write its memory, [B].
    pub(crate) write: &'a [bool],
    /// The spans that this run gathers for or writes, in a span bundle; B is 1 then.
    pub(crate) spans: Option<ChunkSpans<'a>>,
    /// Which logits are wanted, as rows b·T + t.
    pub(crate) rows: Rows<'a>,
    /// The states before, float32 [B, layers, heads, r, r].
    pub(crate) past_memory: Numbers<'a>,
    /// Where the states after go.
    pub(crate) present_memory: NumbersMut<'a>,
    /// What the turns carry, with room for the tokens.
    pub(crate) turn: TurnTensors<'a>,
    /// What the corrections are multiplied by; other than 1 it takes the measured graph.
    pub(crate) strength: f32,
    /// Where the logits go, float32 [rows, vocab].
    pub(crate) logits: NumbersMut<'a>,
    /// What else is wanted; B is 1 then.
    pub(crate) measures: Measures<'a>,
    /// Whether it is a step that will not come again as it is, so that it would be captured for nothing.
    pub(crate) by_chance: bool,
}

/// Where the outputs of the measured graph go; asking for one takes that graph.
#[derive(Default)]
pub(crate) struct Measures<'a> {
    /// The corrections' energies, float32 [tokens, layers, delta heads, 2].
    pub(crate) energy: Option<&'a mut [f32]>,
    /// What each token reads the memory with, float32 [tokens, layers, heads, r].
    pub(crate) queries: Option<&'a mut [f32]>,
    /// Each token's gates, float32 [tokens, layers, kinds, width].
    pub(crate) gates: Option<&'a mut [f32]>,
}

impl Measures<'_> {
    /// Whether it takes the measured graph.
    pub(crate) fn any(&self) -> bool {
        self.energy.is_some() || self.queries.is_some() || self.gates.is_some()
    }
}

/// Whether a strength changes nothing.
pub(crate) fn as_trained(strength: f32) -> bool {
    strength.to_bits() == 1.0_f32.to_bits()
}

/// The S spans of one run.
pub(crate) struct ChunkSpans<'a> {
    /// 1/length of each span for the tokens in it, float32 [S, tokens].
    pub(crate) weights: &'a [f32],
    /// Whether they are complete with this run, and written.
    pub(crate) complete: bool,
    /// What they gathered before, float32 [S, layers, W].
    pub(crate) past: &'a [f32],
    /// Where goes what they have gathered then, float32 [S, layers, W].
    pub(crate) present: &'a mut [f32],
}

/// The names of all inputs and outputs that a manifest asks for.
#[derive(Debug)]
pub(crate) struct Names {
    input_ids: CString,
    attention_mask: CString,
    position_ids: CString,
    write_mask: CString,
    logits_rows: CString,
    past_memory: CString,
    logits: CString,
    present_memory: CString,
    delta_energy: CString,
    queries: CString,
    gates: CString,
    strength: CString,
    span_weights: CString,
    span_mask: CString,
    past_spans: CString,
    present_spans: CString,
    /// (input, output) of each extra state, in the manifest's order.
    states: Vec<(CString, CString)>,
    /// (past, present) in the order of the cache's buffers.
    kv: Vec<(CString, CString)>,
}

impl Names {
    pub(crate) fn new(manifest: &Manifest) -> Self {
        // None of these names can hold a NUL byte (the manifest's check holds that), so the empty default is never taken.
        let name = |text: &str| CString::new(text).unwrap_or_default();
        let kv = manifest
            .graph
            .kv_layers
            .iter()
            .flat_map(|layer| ["key", "value"].map(|part| (layer, part)))
            .map(|(layer, part)| {
                (
                    name(&format!("past_key_values.{layer}.{part}")),
                    name(&format!("present.{layer}.{part}")),
                )
            })
            .collect();
        Self {
            input_ids: name("input_ids"),
            attention_mask: name("attention_mask"),
            position_ids: name("position_ids"),
            write_mask: name("write_mask"),
            logits_rows: name("logits_rows"),
            past_memory: name("past_memory"),
            logits: name("logits"),
            present_memory: name("present_memory"),
            delta_energy: name("delta_energy"),
            queries: name("queries"),
            gates: name("gates"),
            strength: name("strength"),
            span_weights: name("span_weights"),
            span_mask: name("span_mask"),
            past_spans: name("past_spans"),
            present_spans: name("present_spans"),
            states: manifest
                .graph
                .states
                .iter()
                .map(|state| (name(&state.input), name(&state.output)))
                .collect(),
            kv,
        }
    }
}

impl Graph {
    /// Opens a graph of the bundle, the measured one if asked, and holds it against the manifest.
    pub(crate) fn open(
        runtime: &'static Runtime,
        bundle: &Bundle,
        options: &LoadOptions,
        names: &Names,
        home: &Home,
        measured: bool,
    ) -> Result<Self> {
        let provider = home.as_ref().map(|memory| memory.provider());
        let captures = match home {
            Some(memory) if options.cuda_graphs && !measured => Some(Captures::new(Arc::clone(memory))?),
            _ => None,
        };
        let graph = &bundle.manifest().graph;
        let file = if measured {
            graph.measured_file.as_deref().ok_or_else(|| {
                EngineError::Unsupported(
                    "this bundle has no measured graph, so the corrections' size cannot be measured; export it again".into(),
                )
            })?
        } else {
            options
                .graph
                .of(bundle.manifest(), runs_on(home, bundle.manifest()))?
                .file()
        };
        let mut builder = OnnxSession::builder(runtime.environment())
            .map_err(EngineError::onnx("preparing a session"))?
            .with_optimization_level(GraphOptimizationLevel::All)
            .map_err(EngineError::onnx("preparing a session"))?
            .with_log_level(ort::logging::LogLevel::Error)
            .map_err(EngineError::onnx("preparing a session"))?
            .with_intra_op_spinning(true)
            .map_err(EngineError::onnx("preparing a session"))?
            .with_config_entry("session.intra_op.spin_duration_us", SPIN_US)
            .map_err(EngineError::onnx("preparing a session"))?
            .with_operators(
                operator::domain(provider).map_err(EngineError::onnx("preparing the memory's operator"))?,
            )
            .map_err(EngineError::onnx("preparing the memory's operator"))?;
        if let Some(prefix) = std::env::var_os(PROFILE) {
            builder = builder
                .with_profiling(prefix)
                .map_err(EngineError::onnx("preparing a profile"))?;
        }
        if options.threads > 0 {
            builder = builder
                .with_intra_threads(options.threads)
                .map_err(EngineError::onnx("setting the number of threads"))?;
        }
        if let Some(provider) = provider {
            builder = provider.register(builder, captures.is_some())?;
        }
        let session = builder
            .commit_from_file(bundle.path(file))
            .map_err(EngineError::onnx("loading the graph"))
            .map_err(|error| match (provider, error) {
                (Some(_), EngineError::Onnx { message, .. }) if captures.is_some() && message.contains("graph capture") => {
                    EngineError::Unsupported(format!(
                        "cuda_graphs=True, but ONNX Runtime cannot capture the graph {file}; leave cuda_graphs out. ONNX Runtime says: {message}"
                    ))
                }
                (Some(provider), error) => provider.explain(error),
                (None, error) => error,
            })?;
        check_graph(&session, bundle.manifest(), names, measured, file)?;
        Ok(Self {
            captures,
            session,
            mask: Vec::new(),
            positions: Vec::new(),
            rows: Vec::new(),
            write: Vec::new(),
            strength: Vec::new(),
            span_mask: Vec::new(),
            measured,
        })
    }

    /// Whether the graph takes any number of turns at once, as far as its inputs say.
    pub(crate) fn takes_batches(&self) -> bool {
        let free = |outlet: &Outlet| matches!(outlet.dtype(), ValueType::Tensor { shape, .. } if shape.first().is_some_and(|&size| size < 0));
        self.session
            .inputs()
            .iter()
            .filter(|outlet| outlet.name() != "logits_rows")
            .all(free)
    }

    /// Runs. On an error nothing but the run's own output buffers was touched.
    pub(crate) fn run(&mut self, model: &Model, run: Run<'_>) -> Result<()> {
        let fixed = self.captures(&run);
        let Some(memory) = model.home().as_ref().filter(|_| fixed) else {
            return self.run_bound(model, run, false);
        };
        let Run { logits, .. } = run;
        let NumbersMut::Host(numbers) = logits else {
            return self.run_bound(model, Run { logits, ..run }, true);
        };
        // What is captured writes nothing on the host: logits that are wanted there are brought behind it.
        let mut buffer = memory.allocate(size_of_val(numbers))?;
        let logits = NumbersMut::Device(&mut buffer);
        self.run_bound(model, Run { logits, ..run }, true)?;
        buffer.download(0, bytemuck::cast_slice_mut(numbers))
    }

    /// Runs with everything where it is to lie; `fixed` is a step that looks the same until its caches grow.
    #[allow(clippy::too_many_lines)] // tensor after tensor, all of them borrowed until the run
    fn run_bound(&mut self, model: &Model, run: Run<'_>, fixed: bool) -> Result<()> {
        let Run {
            tokens,
            past: lengths,
            write,
            spans,
            rows,
            past_memory,
            present_memory,
            turn,
            strength,
            logits,
            measures,
            by_chance: _,
        } = run;
        let batch = lengths.len();
        let count = tokens.len() / batch.max(1);
        let total = lengths.iter().max().map_or(count, |past| past + count);
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let manifest = model.manifest();
        let total = if fixed { turn.shapes[0][2] } else { total };
        // Of the mask only the ones of a row count: padding stands behind.
        self.mask.clear();
        for past in lengths {
            self.mask.resize(self.mask.len() + past + count, 1);
            self.mask.resize(self.mask.len() + total - (past + count), 0);
        }
        self.write.clear();
        for &write in write {
            self.write
                .resize(self.write.len() + count, if write { 1.0 } else { 0.0 });
        }
        self.rows.clear();
        match rows {
            Rows::All => self.rows.extend((0..tokens.len()).map(number)),
            Rows::Last => self.rows.push(number(tokens.len()) - 1),
            Rows::These(rows) => self.rows.extend(rows),
        }

        let [layers, heads, rank, _] = model.geometry().shape();
        let memory_shape = [batch, layers, heads, rank, rank];
        let names = model.names();
        self.positions.clear();
        if manifest.graph.position_ids {
            for &past in lengths {
                self.positions.extend((past..past + count).map(number));
            }
        }

        let packed = match &mut self.captures {
            Some(captures) if fixed => Some(captures.bring(&[
                bytemuck::cast_slice(tokens),
                bytemuck::cast_slice(&self.mask),
                bytemuck::cast_slice(&self.write),
                bytemuck::cast_slice(&self.rows),
                bytemuck::cast_slice(&self.positions),
            ])?),
            _ => None,
        };
        let packed = packed.as_ref();
        let input_ids = small_tensor(packed, 0, tokens, &[batch, count])?;
        let attention_mask = small_tensor(packed, 1, &self.mask, &[batch, total])?;
        let write_mask = small_tensor(packed, 2, &self.write, &[batch, count])?;
        let logits_rows = small_tensor(packed, 3, &self.rows, &[self.rows.len()])?;
        let past = match past_memory {
            Numbers::Host(numbers) => Tensor::input(numbers, &memory_shape)?,
            Numbers::Device(buffer, start) => device_tensor(buffer, start, &memory_shape)?,
        };
        let mut present = match present_memory {
            NumbersMut::Host(numbers) => Tensor::output(numbers, &memory_shape)?,
            NumbersMut::Device(buffer) => device_tensor(buffer, 0, &memory_shape)?,
            NumbersMut::Rows(buffer) => device_tensor(buffer, 0, &memory_shape)?,
        };
        let logits_shape = [self.rows.len(), model.vocab()];
        let mut wanted = match logits {
            NumbersMut::Host(numbers) => Tensor::output(numbers, &logits_shape)?,
            NumbersMut::Device(buffer) => device_tensor(buffer, 0, &logits_shape)?,
            NumbersMut::Rows(buffer) => device_tensor(buffer, 0, &logits_shape)?,
        };
        let (mut caches, mut states) = turn_tensors(turn, batch, manifest)?;
        let (position_ids, strengths, span_inputs);
        let (mut energies, mut queries, mut gates, mut present_spans);

        let mut call = Call::default();
        call.input(&names.input_ids, &input_ids);
        call.input(&names.attention_mask, &attention_mask);
        if manifest.graph.position_ids {
            position_ids = small_tensor(packed, 4, &self.positions, &[batch, count])?;
            call.input(&names.position_ids, &position_ids);
        }
        call.input(&names.write_mask, &write_mask);
        if self.measured && manifest.graph.strength {
            self.strength.clear();
            self.strength.resize(tokens.len(), strength);
            strengths = Tensor::input(&self.strength, &[batch, count])?;
            call.input(&names.strength, &strengths);
        }
        call.input(&names.logits_rows, &logits_rows);
        call.input(&names.past_memory, &past);
        call.output(&names.logits, &mut wanted);
        call.output(&names.present_memory, &mut present);
        for ((past, present), (first, second)) in names.kv.iter().zip(&mut caches) {
            match second {
                None => call.in_place(past, present, first),
                Some(second) => {
                    call.input(past, first);
                    call.output(present, second);
                }
            }
        }
        for ((input, output), (read, written)) in names.states.iter().zip(&mut states) {
            call.input(input, read);
            call.output(output, written);
        }
        if let Some(width) = manifest.graph.span_width {
            let spans = spans.unwrap_or(ChunkSpans {
                weights: &[],
                complete: false,
                past: &[],
                present: &mut [],
            });
            let number = spans.past.len() / (layers * width);
            self.span_mask.clear();
            self.span_mask
                .resize(number, if spans.complete { 1.0 } else { 0.0 });
            let shape = [batch, number, layers, width];
            span_inputs = [
                Tensor::input(spans.weights, &[batch, number, count])?,
                Tensor::input(&self.span_mask, &[batch, number])?,
                Tensor::input(spans.past, &shape)?,
            ];
            let [weights, mask, past] = &span_inputs;
            present_spans = Tensor::output(spans.present, &shape)?;
            call.input(&names.span_weights, weights);
            call.input(&names.span_mask, mask);
            call.input(&names.past_spans, past);
            call.output(&names.present_spans, &mut present_spans);
        }
        if let Some(energy) = measures.energy {
            let heads = manifest.memory.delta_heads.len();
            energies = Tensor::output(energy, &[batch, count, layers, heads, 2])?;
            call.output(&names.delta_energy, &mut energies);
        }
        if let Some(wanted) = measures.queries {
            queries = Tensor::output(wanted, &[batch, count, layers, heads, rank])?;
            call.output(&names.queries, &mut queries);
        }
        if let Some(wanted) = measures.gates {
            let (kinds, width) = (manifest.memory.gate_kinds(), manifest.memory.gate_width());
            gates = Tensor::output(wanted, &[batch, count, layers, kinds, width])?;
            call.output(&names.gates, &mut gates);
        }
        match &mut self.captures {
            None => call.run(&mut self.session),
            Some(captures) => {
                let sizes = fixed.then_some([batch, total]);
                run_captured(captures, &mut self.session, model, &call, sizes)
            }
        }
        .map_err(|error| match model.home() {
            Some(memory) => memory.provider().explain(error),
            None => error,
        })
    }

    /// Whether this is a step that is captured.
    fn captures(&self, run: &Run<'_>) -> bool {
        run.tokens.len() == run.past.len()
            && self.captures.as_ref().is_some_and(Captures::on)
            && matches!(run.past_memory, Numbers::Device(..))
            && matches!(run.present_memory, NumbersMut::Device(_) | NumbersMut::Rows(_))
            && !run.by_chance
    }

    /// Whether steps are captured, so that it pays to have them look the same.
    pub(crate) fn captures_steps(&self) -> bool {
        self.captures.as_ref().is_some_and(Captures::on)
    }
}

/// Runs a call on the thread of a session that captures: as a capture of its own kind where it is a step of these sizes, else by itself. A step
/// that cannot be captured runs by itself, and none is captured after it.
fn run_captured(
    captures: &mut Captures,
    session: &mut OnnxSession,
    model: &Model,
    call: &Call<'_, '_>,
    step: Option<[usize; 2]>,
) -> Result<()> {
    let Some(sizes) = step else {
        return call.run_as(session, captures.worker(), As::Itself);
    };
    let mut key = call.addresses().to_vec();
    key.extend(sizes);
    let (how, first) = captures.like(key);
    let done = if first {
        // ONNX Runtime captures in CUDA's strictest mode, in which no other thread may allocate.
        captures
            .memory()
            .quietly(|| call.run_as(session, captures.worker(), how))
    } else {
        call.run_as(session, captures.worker(), how)
    };
    match (done, how) {
        (Err(error), As::Captured(_)) => {
            captures.give_up();
            model.not_captured(&error);
            call.run_as(session, captures.worker(), As::Itself)
        }
        (Ok(()), As::Captured(_)) => {
            model.counters.captured(captures.count());
            Ok(())
        }
        (done, As::Itself) => done,
    }
}

/// A small input: where it was brought to, or on the host.
fn small_tensor<'a, T: Element>(
    packed: Option<&'a Packed>,
    index: usize,
    numbers: &'a [T],
    shape: &[usize],
) -> Result<Tensor<'a>> {
    match packed {
        None => Tensor::input(numbers, shape),
        Some(Packed { buffer, starts }) => Tensor::device(
            buffer,
            starts[index],
            size_of_val(numbers),
            shape,
            T::TYPE,
            size_of::<T>(),
        ),
    }
}

/// Float32 on the device.
fn device_tensor<'a>(buffer: &'a DeviceBuffer, start: usize, shape: &[usize]) -> Result<Tensor<'a>> {
    let number = size_of::<f32>();
    let bytes = shape.iter().product::<usize>() * number;
    Tensor::device(buffer, start, bytes, shape, TensorElementType::Float32, number)
}

/// The type that ONNX Runtime calls it.
fn onnx_type(element: ElementType) -> TensorElementType {
    match element {
        ElementType::Float32 => TensorElementType::Float32,
        ElementType::Float16 => TensorElementType::Float16,
        ElementType::Bfloat16 => TensorElementType::Bfloat16,
        ElementType::Int8 => TensorElementType::Int8,
    }
}

fn bytes_tensor<'a>(bytes: &'a mut [u8], shape: &[usize], element: ElementType) -> Result<Tensor<'a>> {
    Tensor::bytes(bytes, shape, onnx_type(element), element.bytes())
}

fn part_tensor<'a>(part: Part<'a>, shape: &[usize], element: ElementType) -> Result<Tensor<'a>> {
    part.tensor(shape, onnx_type(element), element.bytes())
}

/// Past and present of one cache: one tensor, or two.
type CacheTensors<'a> = (Tensor<'a>, Option<Tensor<'a>>);

/// The caches in the order of [`Names::kv`], and (read, written) of the states in the order of [`Names::states`].
#[allow(clippy::type_complexity)] // said in words above
fn turn_tensors<'a>(
    turn: TurnTensors<'a>,
    batch: usize,
    manifest: &Manifest,
) -> Result<(Vec<CacheTensors<'a>>, Vec<(Tensor<'a>, Tensor<'a>)>)> {
    let (element, [past_shape, present_shape]) = (manifest.graph.kv_dtype, turn.shapes);
    let caches = turn
        .kv
        .into_iter()
        .map(|tensor| {
            Ok(match tensor {
                KvTensor::Shared(both) => (part_tensor(both, &past_shape, element)?, None),
                KvTensor::Separate(past, present) => (
                    part_tensor(past, &past_shape, element)?,
                    Some(part_tensor(present, &present_shape, element)?),
                ),
            })
        })
        .collect::<Result<_>>()?;
    let states = turn
        .states
        .into_iter()
        .zip(&manifest.graph.states)
        .map(|((read, written), state)| {
            let shape: Vec<usize> = std::iter::once(batch)
                .chain(state.shape.iter().copied())
                .collect();
            Ok((
                bytes_tensor(read, &shape, state.dtype)?,
                bytes_tensor(written, &shape, state.dtype)?,
            ))
        })
        .collect::<Result<_>>()?;
    Ok((caches, states))
}

/// One input or output that the manifest asks for: name, type, shape (-1 is any size).
type Expected<'a> = (&'a CString, TensorElementType, Vec<i64>);

/// The inputs that the manifest asks for, and the outputs.
fn expected<'a>(manifest: &Manifest, names: &'a Names, measured: bool) -> [Vec<Expected<'a>>; 2] {
    const ANY: i64 = -1;
    let size = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    let (memory, backbone) = (&manifest.memory, &manifest.backbone);
    let (int, float) = (TensorElementType::Int64, TensorElementType::Float32);
    let layers = size(memory.layers.len());
    let state = vec![
        ANY,
        layers,
        size(memory.heads),
        size(memory.rank),
        size(memory.rank),
    ];
    let cache = vec![ANY, size(backbone.num_kv_heads), ANY, size(backbone.head_dim)];
    let kv_type = onnx_type(manifest.graph.kv_dtype);

    let mut inputs = vec![
        (&names.input_ids, TensorElementType::Int32, vec![ANY, ANY]),
        (&names.attention_mask, int, vec![ANY, ANY]),
        (&names.write_mask, float, vec![ANY, ANY]),
        (&names.logits_rows, int, vec![ANY]),
        (&names.past_memory, float, state.clone()),
    ];
    if manifest.graph.position_ids {
        inputs.push((&names.position_ids, int, vec![ANY, ANY]));
    }
    let mut outputs = vec![
        (&names.logits, float, vec![ANY, size(backbone.vocab_size)]),
        (&names.present_memory, float, state),
    ];
    if measured {
        let delta = vec![ANY, ANY, layers, size(memory.delta_heads.len()), 2];
        let queries = vec![ANY, ANY, layers, size(memory.heads), size(memory.rank)];
        outputs.push((&names.delta_energy, float, delta));
        outputs.push((&names.queries, float, queries));
        if manifest.graph.gates {
            let (kinds, width) = (size(memory.gate_kinds()), size(memory.gate_width()));
            outputs.push((&names.gates, float, vec![ANY, ANY, layers, kinds, width]));
        }
        if manifest.graph.strength {
            inputs.push((&names.strength, float, vec![ANY, ANY]));
        }
    }
    for (past, present) in &names.kv {
        inputs.push((past, kv_type, cache.clone()));
        outputs.push((present, kv_type, cache.clone()));
    }
    for ((input, output), state) in names.states.iter().zip(&manifest.graph.states) {
        let shape: Vec<i64> = std::iter::once(ANY)
            .chain(state.shape.iter().map(|&n| size(n)))
            .collect();
        inputs.push((input, onnx_type(state.dtype), shape.clone()));
        outputs.push((output, onnx_type(state.dtype), shape));
    }
    if let Some(width) = manifest.graph.span_width {
        let gathered = vec![ANY, ANY, layers, size(width)];
        inputs.push((&names.span_weights, float, vec![ANY, ANY, ANY]));
        inputs.push((&names.span_mask, float, vec![ANY, ANY]));
        inputs.push((&names.past_spans, float, gathered.clone()));
        outputs.push((&names.present_spans, float, gathered));
    }
    [inputs, outputs]
}

/// Holds the graph's own inputs and outputs against what the manifest says they are.
fn check_graph(
    session: &OnnxSession,
    manifest: &Manifest,
    names: &Names,
    measured: bool,
    file: &str,
) -> Result<()> {
    let [inputs, outputs] = expected(manifest, names, measured);
    let wrong = |what: String| EngineError::Graph {
        file: file.to_owned(),
        what,
    };
    for (kind, expected, found) in [
        ("input", inputs, session.inputs()),
        ("output", outputs, session.outputs()),
    ] {
        if expected.len() != found.len() {
            let names: Vec<_> = found.iter().map(Outlet::name).collect();
            return Err(wrong(format!(
                "found {} {kind}s ({}), expected {}",
                found.len(),
                names.join(", "),
                expected.len()
            )));
        }
        for (name, ty, shape) in expected {
            let name = name.to_string_lossy();
            let outlet = found
                .iter()
                .find(|outlet| outlet.name() == name)
                .ok_or_else(|| wrong(format!("the {kind} {name} is missing")))?;
            let ValueType::Tensor {
                ty: found_ty,
                shape: found_shape,
                ..
            } = outlet.dtype()
            else {
                return Err(wrong(format!("the {kind} {name} is no tensor")));
            };
            let fits = found_shape.len() == shape.len()
                && found_shape
                    .iter()
                    .zip(&shape)
                    .all(|(&found, &wanted)| found == wanted || found < 0 || wanted < 0);
            if *found_ty != ty || !fits {
                return Err(wrong(format!(
                    "the {kind} {name} is {found_ty} {:?}, expected {ty} {shape:?} (-1 is any size)",
                    &found_shape[..]
                )));
            }
        }
    }
    Ok(())
}
