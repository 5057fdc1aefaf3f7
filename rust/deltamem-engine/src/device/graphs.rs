//! Four small ONNX graphs that work on memory where it lies: copies, zeros, rows into groups of another size, and the best of rows of logits. The
//! first three do so for any number of parts in one run, because each run is waited for. They are written here, byte by byte in ONNX's own format, because they are shorter than what would read them from a file. Those that move
//! count in int32, so that no number is looked at; each operator in them has a kernel for the processor and for CUDA.

use std::ffi::CStr;

/// How many rows of each group, int64 [1].
pub(crate) const TAKE: &CStr = c"take";
/// The shape of the zeros, int64 [1] or [3].
pub(crate) const SIZE: &CStr = c"size";
/// Rows of numbers, float32 [rows, words].
pub(crate) const LOGITS: &CStr = c"logits";
/// How many of each row, int64 [1].
pub(crate) const COUNT: &CStr = c"count";
/// The largest of each row, float32 [rows, count].
pub(crate) const VALUES: &CStr = c"values";
/// Their places in it, int64 [rows, count].
pub(crate) const IDS: &CStr = c"ids";
/// 1 where a row has a number that is none, else 0; float32 [rows].
pub(crate) const WRONG: &CStr = c"wrong";

/// ONNX's numbers for the element types.
const FLOAT: u64 = 1;
const INT32: u64 = 6;
const INT64: u64 = 7;

/// ONNX's numbers for an attribute that is an integer, a tensor, and several integers.
const INT: u64 = 2;
const TENSOR: u64 = 4;
const INTS: u64 = 7;

/// The format's version that opset 17 came with, which every ONNX Runtime reads that the engine takes.
const IR_VERSION: u64 = 8;
const OPSET: u64 = 17;

/// The name of the input that is moved into the part `number`.
pub(crate) fn from(number: usize) -> String {
    format!("from{number}")
}

/// The name of the output that is the part `number`.
pub(crate) fn to(number: usize) -> String {
    format!("to{number}")
}

/// Each `to` = its `from`, int32 [n], with an n of its own.
pub(crate) fn copy(parts: usize) -> Vec<u8> {
    let value = |name: String, part: usize| value(&name, INT32, &[&format!("n{part}")]);
    model(
        &each(parts, |part| node("Identity", &[&from(part)], &to(part), &[])),
        &[],
        &each(parts, |part| value(from(part), part)),
        &each(parts, |part| value(to(part), part)),
    )
}

/// Each `to` = zeros of `size`, int32 [n].
pub(crate) fn zero(parts: usize) -> Vec<u8> {
    model(
        &each(parts, |part| zeros(&to(part))),
        &[],
        &[value("size", INT64, &["1"])],
        &each(parts, |part| value(&to(part), INT32, &["n"])),
    )
}

/// Each `to` [groups, rows, row] = the first `take` rows of each group of its `from`, and zeros of `size` behind them.
pub(crate) fn rows(parts: usize) -> Vec<u8> {
    let taken = |part: usize| format!("taken{part}");
    let mut nodes = vec![zeros("rest")];
    for part in 0..parts {
        let slice = [&from(part), "first", "take", "axis"];
        nodes.push(node("Slice", &slice, &taken(part), &[]));
        let both = [&taken(part), "rest"];
        nodes.push(node("Concat", &both, &to(part), &[integer("axis", 1)]));
    }
    let mut inputs = each(parts, |part| {
        value(&from(part), INT32, &["groups", "from_rows", "row"])
    });
    inputs.push(value("take", INT64, &["1"]));
    inputs.push(value("size", INT64, &["3"]));
    model(
        &nodes,
        &[tensor("first", INT64, 7, 0), tensor("axis", INT64, 7, 1)],
        &inputs,
        &each(parts, |part| {
            value(&to(part), INT32, &["groups", "to_rows", "row"])
        }),
    )
}

fn each(parts: usize, of: impl Fn(usize) -> Vec<u8>) -> Vec<Vec<u8>> {
    (0..parts).map(of).collect()
}

/// `values` and `ids` = the `count` largest numbers of each row of `logits`, `wrong` = whether one of the row is NaN: what is the largest then
/// is anybody's guess. Which of equal numbers at the border are taken is left to the operator: CUDA's takes them as its threads find them.
pub(crate) fn best() -> Vec<u8> {
    model(
        &[
            operator("TopK", &["logits", "count"], &["values", "ids"], &[]),
            node("IsNaN", &["logits"], "nan", &[]),
            node("Cast", &["nan"], "ones", &[integer("to", FLOAT)]),
            node(
                "ReduceMax",
                &["ones"],
                "wrong",
                &[integers("axes", &[1]), integer("keepdims", 0)],
            ),
        ],
        &[],
        &[
            value("logits", FLOAT, &["rows", "words"]),
            value("count", INT64, &["1"]),
        ],
        &[
            value("values", FLOAT, &["rows", "k"]),
            value("ids", INT64, &["rows", "k"]),
            value("wrong", FLOAT, &["rows"]),
        ],
    )
}

fn zeros(to: &str) -> Vec<u8> {
    let mut attribute = text(1, "value");
    attribute.extend(bytes(5, &tensor("", INT32, 5, 0)));
    attribute.extend(number(20, TENSOR));
    node("ConstantOfShape", &["size"], to, &[attribute])
}

/// A `ModelProto`.
fn model(nodes: &[Vec<u8>], constants: &[Vec<u8>], inputs: &[Vec<u8>], outputs: &[Vec<u8>]) -> Vec<u8> {
    let mut graph = Vec::new();
    for node in nodes {
        graph.extend(bytes(1, node));
    }
    graph.extend(text(2, "moves"));
    for constant in constants {
        graph.extend(bytes(5, constant));
    }
    for input in inputs {
        graph.extend(bytes(11, input));
    }
    for output in outputs {
        graph.extend(bytes(12, output));
    }
    let mut opset = text(1, "");
    opset.extend(number(2, OPSET));
    let mut model = number(1, IR_VERSION);
    model.extend(bytes(7, &graph));
    model.extend(bytes(8, &opset));
    model
}

/// A `NodeProto` with one output.
fn node(kind: &str, inputs: &[&str], output: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    operator(kind, inputs, &[output], attributes)
}

/// A `NodeProto`, named for its first output.
fn operator(kind: &str, inputs: &[&str], outputs: &[&str], attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut node = Vec::new();
    for input in inputs {
        node.extend(text(1, input));
    }
    for output in outputs {
        node.extend(text(2, output));
    }
    node.extend(text(3, outputs.first().copied().unwrap_or_default()));
    node.extend(text(4, kind));
    for attribute in attributes {
        node.extend(bytes(5, attribute));
    }
    node
}

/// An `AttributeProto` with an integer.
fn integer(name: &str, value: u64) -> Vec<u8> {
    let mut attribute = text(1, name);
    attribute.extend(number(3, value));
    attribute.extend(number(20, INT));
    attribute
}

/// An `AttributeProto` with integers.
fn integers(name: &str, values: &[u64]) -> Vec<u8> {
    let mut attribute = text(1, name);
    for &value in values {
        attribute.extend(number(8, value));
    }
    attribute.extend(number(20, INTS));
    attribute
}

/// A `TensorProto` of shape [1]; `field` is where a number of that type stands.
fn tensor(name: &str, element: u64, field: u64, value: u64) -> Vec<u8> {
    let mut tensor = number(1, 1);
    tensor.extend(number(2, element));
    tensor.extend(bytes(field, &varint(value)));
    tensor.extend(text(8, name));
    tensor
}

/// A `ValueInfoProto`; a dimension is a number or a name.
fn value(name: &str, element: u64, shape: &[&str]) -> Vec<u8> {
    let mut dimensions = Vec::new();
    for dimension in shape {
        let dimension = match dimension.parse() {
            Ok(size) => number(1, size),
            Err(_) => text(2, dimension),
        };
        dimensions.extend(bytes(1, &dimension));
    }
    let mut tensor = number(1, element);
    tensor.extend(bytes(2, &dimensions));
    let mut value = text(1, name);
    value.extend(bytes(2, &bytes(1, &tensor)));
    value
}

/// A field that is text.
fn text(field: u64, text: &str) -> Vec<u8> {
    bytes(field, text.as_bytes())
}

/// A field of so many bytes.
fn bytes(field: u64, bytes: &[u8]) -> Vec<u8> {
    let mut out = varint(field << 3 | 2);
    out.extend(varint(bytes.len() as u64));
    out.extend(bytes);
    out
}

/// A field that is a number.
fn number(field: u64, value: u64) -> Vec<u8> {
    let mut out = varint(field << 3);
    out.extend(varint(value));
    out
}

/// Seven bits a byte, the lowest first.
fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let low = u8::try_from(value & 0x7f).unwrap_or(0);
        value >>= 7;
        out.push(if value > 0 { low | 0x80 } else { low });
        if value == 0 {
            return out;
        }
    }
}
