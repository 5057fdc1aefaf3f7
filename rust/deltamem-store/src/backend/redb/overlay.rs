//! A file that is never changed: writes stay in memory, over it. redb repairs what it opens; over an overlay it may, and the file stays
//! as it is. For looking at a database beside its writer, and for saving what a damaged one holds.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use redb::StorageBackend;

const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;

#[derive(Debug)]
struct Content {
    length: u64,
    /// What was written, page by page.
    pages: BTreeMap<u64, Box<[u8]>>,
}

/// The file and what was written over it.
#[derive(Debug, Clone)]
pub(crate) struct Overlay {
    file: Arc<Box<dyn StorageBackend>>,
    content: Arc<Mutex<Content>>,
}

impl Overlay {
    pub(crate) fn new(file: Box<dyn StorageBackend>) -> io::Result<Self> {
        let length = file.len()?;
        Ok(Self {
            file: Arc::new(file),
            content: Arc::new(Mutex::new(Content {
                length,
                pages: BTreeMap::new(),
            })),
        })
    }

    /// The same file without anything written over it.
    pub(crate) fn again(&self) -> io::Result<Self> {
        let length = self.file.len()?;
        Ok(Self {
            file: self.file.clone(),
            content: Arc::new(Mutex::new(Content {
                length,
                pages: BTreeMap::new(),
            })),
        })
    }

    /// One page: as written, or as in the file, with zeros where the file ends.
    fn page(&self, content: &Content, number: u64) -> io::Result<Box<[u8]>> {
        if let Some(page) = content.pages.get(&number) {
            return Ok(page.clone());
        }
        let mut page = vec![0; PAGE_BYTES].into_boxed_slice();
        let start = number * PAGE;
        let end = self.file.len()?.min(start + PAGE);
        if start < end {
            self.file.read(
                start,
                &mut page[..usize::try_from(end - start).map_err(io::Error::other)?],
            )?;
        }
        Ok(page)
    }

    fn each_part(
        offset: u64,
        length: usize,
        mut work: impl FnMut(u64, std::ops::Range<usize>, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let inside = usize::try_from(at % PAGE).map_err(io::Error::other)?;
            let count = (PAGE_BYTES - inside).min(length - done);
            work(at / PAGE, inside..inside + count, done..done + count)?;
            done += count;
        }
        Ok(())
    }
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.content.lock().length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let content = self.content.lock();
        if offset
            .checked_add(out.len() as u64)
            .is_none_or(|end| end > content.length)
        {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Self::each_part(offset, out.len(), |page, inside, outside| {
            out[outside].copy_from_slice(&self.page(&content, page)?[inside]);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut content = self.content.lock();
        if len < content.length {
            // What is beyond must read as zeros if it grows again.
            let last = len / PAGE;
            let mut page = self.page(&content, last)?;
            page[usize::try_from(len % PAGE).map_err(io::Error::other)?..].fill(0);
            for number in last..=content.length / PAGE {
                content
                    .pages
                    .insert(number, vec![0; PAGE_BYTES].into_boxed_slice());
            }
            content.pages.insert(last, page);
        }
        content.length = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut content = self.content.lock();
        Self::each_part(offset, data.len(), |number, inside, outside| {
            let mut page = self.page(&content, number)?;
            page[inside].copy_from_slice(&data[outside]);
            content.pages.insert(number, page);
            Ok(())
        })?;
        content.length = content.length.max(offset + data.len() as u64);
        Ok(())
    }
}
