//! Bytes of fixed form: numbers little-endian, texts and lists with their length before them. Reading trusts nothing: every length is
//! checked against what is left, nothing may follow the end, and whatever differs is named.

/// Puts values one behind the other.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn maybe_u64(&mut self, value: Option<u64>) -> &mut Self {
        match value {
            None => self.u8(0),
            Some(value) => self.u8(1).u64(value),
        }
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn maybe_id(&mut self, id: Option<&[u8; 32]>) -> &mut Self {
        match id {
            None => self.u8(0),
            Some(id) => self.u8(1).raw(id),
        }
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.u64(bytes.len() as u64).raw(bytes)
    }

    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        self.bytes(text.as_bytes())
    }
}

/// Takes values out again; each error says what was missed.
pub(crate) struct Reader<'a> {
    left: &'a [u8],
}

pub(crate) type Result<T> = std::result::Result<T, String>;

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    pub(crate) fn raw(&mut self, count: usize, what: &str) -> Result<&'a [u8]> {
        let Some((found, left)) = self.left.split_at_checked(count) else {
            return Err(format!(
                "{what} wants {count} bytes, {} are left",
                self.left.len()
            ));
        };
        self.left = left;
        Ok(found)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.raw(N, what)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self, what: &str) -> Result<u8> {
        Ok(self.array::<1>(what)?[0])
    }

    pub(crate) fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(crate) fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn flag(&mut self, what: &str) -> Result<bool> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(format!("{what} has the flag {other}, expected 0 or 1")),
        }
    }

    pub(crate) fn maybe_u64(&mut self, what: &str) -> Result<Option<u64>> {
        if self.flag(what)? {
            self.u64(what).map(Some)
        } else {
            Ok(None)
        }
    }

    pub(crate) fn maybe_id(&mut self, what: &str) -> Result<Option<[u8; 32]>> {
        if self.flag(what)? {
            self.array(what).map(Some)
        } else {
            Ok(None)
        }
    }

    pub(crate) fn bytes(&mut self, max: usize, what: &str) -> Result<&'a [u8]> {
        let length = self.u64(what)?;
        match usize::try_from(length) {
            Ok(length) if length <= max => self.raw(length, what),
            _ => Err(format!("{what} has {length} bytes, at most {max} are allowed")),
        }
    }

    pub(crate) fn text(&mut self, max: usize, what: &str) -> Result<String> {
        let bytes = self.bytes(max, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("{what} is no UTF-8"))
    }

    /// How many items follow; each takes at least `least` bytes, so that a wrong count is found before anything is allocated.
    pub(crate) fn count(&mut self, least: usize, what: &str) -> Result<usize> {
        let count = self.u64(what)?;
        let possible = self.left.len() / least.max(1);
        match usize::try_from(count) {
            Ok(count) if count <= possible => Ok(count),
            _ => Err(format!("{what} counts {count}, room is for {possible}")),
        }
    }

    pub(crate) fn end(&self) -> Result<()> {
        match self.left.len() {
            0 => Ok(()),
            left => Err(format!("{left} bytes follow its end")),
        }
    }
}
