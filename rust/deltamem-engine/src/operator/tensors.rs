//! The tensors of one call of an operator: as slices, or as addresses where they lie on a device. It asks ONNX Runtime for pointers and shapes without the descriptions that the `ort`
//! crate would make of every value, which cost more than a layer's arithmetic in a decode step.

use ort::AsPointer;
use ort::operator::ComputeContext;
use ort::sys;
use ort::value::TensorElementType;

/// The most sizes that a shape may have here.
pub(super) const MOST_SIZES: usize = 5;

/// Inputs and outputs of one call.
pub(super) struct Tensors<'a>(&'a ComputeContext);

/// One input.
pub(super) struct Input<'a> {
    name: &'static str,
    sizes: [usize; MOST_SIZES],
    dims: usize,
    values: &'a [f32],
}

impl<'a> Input<'a> {
    pub(super) fn shape(&self) -> &[usize] {
        &self.sizes[..self.dims]
    }

    pub(super) fn values(&self) -> &'a [f32] {
        self.values
    }

    pub(super) fn expect(self, shape: &[usize]) -> Result<Self, String> {
        same_shape(self.name, self.shape(), shape).map(|()| self)
    }
}

/// A tensor that is not looked into here.
pub(super) struct Placed {
    name: &'static str,
    raw: Raw,
}

impl Placed {
    pub(super) fn shape(&self) -> &[usize] {
        &self.raw.sizes[..self.raw.dims]
    }

    /// How many numbers there are.
    pub(super) fn count(&self) -> usize {
        self.raw.count
    }

    pub(super) fn address(&self) -> u64 {
        self.raw.data as usize as u64
    }

    pub(super) fn expect(self, shape: &[usize]) -> Result<Self, String> {
        same_shape(self.name, self.shape(), shape).map(|()| self)
    }

    /// The same for a constant, of which the numbers count and not how they are laid out.
    pub(super) fn expect_count(self, count: usize) -> Result<Self, String> {
        if self.count() == count {
            Ok(self)
        } else {
            Err(format!(
                "{} holds {} numbers, expected {count}",
                self.name,
                self.count()
            ))
        }
    }
}

/// What ONNX Runtime says of a value.
struct Raw {
    data: *mut f32,
    sizes: [usize; MOST_SIZES],
    dims: usize,
    count: usize,
}

impl<'a> Tensors<'a> {
    pub(super) fn new(context: &'a ComputeContext) -> Self {
        Self(context)
    }

    /// Where an input lies, whatever device that is on.
    pub(super) fn placed(
        &self,
        at: usize,
        name: &'static str,
        kind: TensorElementType,
    ) -> Result<Placed, String> {
        self.raw_input(at, name, kind).map(|raw| Placed { name, raw })
    }

    /// Where the output `at` lies; none where the node does not have it.
    pub(super) fn placed_output(
        &self,
        at: usize,
        shape: &[usize],
        kind: TensorElementType,
    ) -> Result<Placed, String> {
        self.raw_output(at, shape, kind).map(|raw| Placed {
            name: "an output",
            raw,
        })
    }

    /// An input that no output is made in the place of.
    #[allow(unsafe_code)]
    pub(super) fn input(&self, at: usize, name: &'static str) -> Result<Input<'a>, String> {
        let raw = self.raw_input(at, name, TensorElementType::Float32)?;
        // SAFETY: ONNX Runtime keeps an input, `count` numbers at `data`, alive and unchanged until the call returns; the context is
        // borrowed as long. No output lies over it: those that may are had from `corrected` alone.
        let values = unsafe { slice(raw.data, raw.count) };
        Ok(Input {
            name,
            sizes: raw.sizes,
            dims: raw.dims,
            values,
        })
    }

    /// The output `at`, which must be asked for once.
    #[allow(unsafe_code)]
    pub(super) fn output(&self, at: usize, shape: &[usize]) -> Result<&'a mut [f32], String> {
        let raw = self.raw_output(at, shape, TensorElementType::Float32)?;
        // SAFETY: ONNX Runtime has just made this output of these sizes, `count` numbers at `data`, for this call to write; the caller
        // asks for each output once, so nobody else holds it.
        Ok(unsafe { slice_mut(raw.data, raw.count) })
    }

    /// An output that is made from an input: (the input, the output). Without the input where ONNX Runtime has put the output in its
    /// place, with the input's numbers in it.
    #[allow(unsafe_code)]
    pub(super) fn corrected(
        &self,
        input: usize,
        input_shape: &[usize],
        output: usize,
        shape: &[usize],
    ) -> Result<(Option<&'a [f32]>, &'a mut [f32]), String> {
        let from = self.raw_input(input, "a projection", TensorElementType::Float32)?;
        if from.sizes[..from.dims] != *input_shape {
            return Err(format!(
                "the projection of input {input} is {:?}, expected {input_shape:?}",
                &from.sizes[..from.dims]
            ));
        }
        let to = self.raw_output(output, shape, TensorElementType::Float32)?;
        // SAFETY: as in `input` and `output`. The two are either the same memory, then only one slice of it is made, or two values that
        // ONNX Runtime keeps apart.
        unsafe {
            let source = if std::ptr::eq(from.data, to.data) {
                None
            } else {
                Some(slice(from.data, from.count))
            };
            Ok((source, slice_mut(to.data, to.count)))
        }
    }

    #[allow(unsafe_code)]
    fn raw_input(&self, at: usize, name: &'static str, kind: TensorElementType) -> Result<Raw, String> {
        let mut value = std::ptr::null();
        // SAFETY: the context is that of the running call, and the out-pointer is valid for it.
        let status = unsafe { (ort::api().KernelContext_GetInput)(self.0.ptr(), at, &raw mut value) };
        check(status)?;
        if value.is_null() {
            return Err(format!("the input {name} is missing"));
        }
        describe(value.cast_mut(), name, kind)
    }

    #[allow(unsafe_code)]
    fn raw_output(&self, at: usize, shape: &[usize], kind: TensorElementType) -> Result<Raw, String> {
        let mut sizes = [0_i64; MOST_SIZES];
        for (size, &wanted) in sizes.iter_mut().zip(shape) {
            *size = i64::try_from(wanted).map_err(|_| format!("output {at}: a size of {wanted}"))?;
        }
        let mut value = std::ptr::null_mut();
        // SAFETY: the context is that of the running call, `sizes` holds `shape.len()` ≤ MOST_SIZES numbers, and the out-pointer is valid.
        let status = unsafe {
            (ort::api().KernelContext_GetOutput)(
                self.0.ptr().cast_mut(),
                at,
                sizes.as_ptr(),
                shape.len().min(MOST_SIZES),
                &raw mut value,
            )
        };
        check(status)?;
        if value.is_null() {
            return Err(format!("the output {at} is missing"));
        }
        let raw = describe(value, "an output", kind)?;
        if raw.sizes[..raw.dims] == *shape {
            Ok(raw)
        } else {
            Err(format!(
                "output {at} was made as {:?}, expected {shape:?}",
                &raw.sizes[..raw.dims]
            ))
        }
    }
}

fn same_shape(name: &str, found: &[usize], expected: &[usize]) -> Result<(), String> {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{name} is {found:?}, expected {expected:?}"))
    }
}

#[allow(unsafe_code)]
fn describe(value: *mut sys::OrtValue, name: &str, wanted: TensorElementType) -> Result<Raw, String> {
    let mut data = std::ptr::null_mut();
    let mut kind = sys::ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    let (mut shape, mut dims) = (std::ptr::null(), 0);
    // SAFETY: the value is one that ONNX Runtime has just given, alive for the call; the out-pointers are valid. The shape's numbers belong
    // to the value and are copied at once.
    let found = unsafe {
        check((ort::api().GetTensorMutableData)(value, &raw mut data))?;
        check((ort::api().GetTensorElementTypeAndShapeDataReference)(
            value,
            &raw mut kind,
            &raw mut shape,
            &raw mut dims,
        ))?;
        if dims == 0 {
            &[][..]
        } else {
            std::slice::from_raw_parts(shape, dims)
        }
    };
    if kind != wanted.into() || dims > MOST_SIZES {
        return Err(format!(
            "{name} is no tensor of {wanted} with at most {MOST_SIZES} sizes"
        ));
    }
    let mut sizes = [0; MOST_SIZES];
    for (size, &found) in sizes.iter_mut().zip(found) {
        *size = usize::try_from(found).map_err(|_| format!("{name} has a size of {found}"))?;
    }
    let count = sizes[..dims]
        .iter()
        .try_fold(1_usize, |count, &size| count.checked_mul(size));
    let count = count.ok_or_else(|| format!("{name} has sizes {:?}", &sizes[..dims]))?;
    Ok(Raw {
        data: data.cast(),
        sizes,
        dims,
        count,
    })
}

/// # Safety
/// `data` points to `count` numbers that nobody writes for `'a`, unless there are none.
#[allow(unsafe_code)]
unsafe fn slice<'a>(data: *const f32, count: usize) -> &'a [f32] {
    if count == 0 || data.is_null() {
        return &[];
    }
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(data, count) }
}

/// # Safety
/// `data` points to `count` numbers that nobody else reads or writes for `'a`, unless there are none.
#[allow(unsafe_code)]
unsafe fn slice_mut<'a>(data: *mut f32, count: usize) -> &'a mut [f32] {
    if count == 0 || data.is_null() {
        return &mut [];
    }
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(data, count) }
}

fn check(status: sys::OrtStatusPtr) -> Result<(), String> {
    #[allow(unsafe_code)]
    // SAFETY: the status came from ONNX Runtime just now and is consumed once.
    unsafe { ort::Error::result_from_status(status) }.map_err(|error| error.to_string())
}
