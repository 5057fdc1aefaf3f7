//! The journal beside the database: a commit is one write and one fsync at its end, into a file that is written over and over from its
//! beginning. When it is full, what it says is written into the tree in one transaction, and it begins anew.
//!
//! A *frame* holds the changes of one fsync:
//!
//! ```text
//! magic 8 · journal's id 16 · number u64 · length u64 · XXH3 of the payload 16 · BLAKE3 of all before 32 · payload
//! ```
//!
//! Each begins at a multiple of 512 bytes. Numbers go up by one for ever; the database says up to which number they are in its tree.
//! Behind the last frame stand older ones, or one whose writing was cut off and which nobody was told of.

use std::io;

use redb::StorageBackend;
use xxhash_rust::xxh3::xxh3_128;

use crate::backend::{Batch, Group, HeadChange, Key, Kind};
use crate::codec::{Reader, Writer};

const MAGIC: &[u8; 8] = b"dmjrnl1\n";
const HEADER: usize = 88;
const FRAME: &str = "deltamem_rt store: journal's frame 1";
const ALIGN: u64 = 512;
/// The file grows by this much at a time.
const STEP: u64 = 1 << 20;

/// Which journal belongs to a database, as the database says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    /// Random, made with the database's first journal.
    pub id: [u8; 16],
    /// The number of the last frame that is in the tree.
    pub applied: u64,
    /// Whether there is a journal with frames that are not in the tree, or may be soon.
    pub open: bool,
}

impl Mark {
    pub(super) fn encode(self) -> Vec<u8> {
        let mut out = Writer::default();
        out.raw(&self.id).u64(self.applied).u8(self.open.into());
        out.0
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut from = Reader::new(bytes);
        let (id, applied) = (from.array("journal's id")?, from.u64("number")?);
        let open = match from.u8("flag")? {
            0 => false,
            1 => true,
            other => return Err(format!("the flag is {other}, expected 0 or 1")),
        };
        from.end()?;
        Ok(Self { id, applied, open })
    }
}

/// The changes of one fsync, as bytes; `room` is a buffer to write them into.
pub(super) fn frame(mut room: Vec<u8>, id: &[u8; 16], number: u64, batches: &[Batch]) -> Vec<u8> {
    room.clear();
    room.resize(HEADER, 0);
    let mut out = Writer(room);
    out.u64(batches.len() as u64);
    for batch in batches {
        out.raw(&batch.group.0).u8(batch.clear.into());
        match &batch.head {
            HeadChange::Keep => out.u8(0),
            HeadChange::Put(head) => out.u8(1).bytes(head),
            HeadChange::Remove => out.u8(2),
        };
        out.u64(batch.deletes.len() as u64);
        for key in &batch.deletes {
            out.u8(key.kind as u8).raw(&key.id);
        }
        out.u64(batch.puts.len() as u64);
        for (key, value) in &batch.puts {
            out.u8(key.kind as u8).raw(&key.id).bytes(value);
        }
    }
    let payload = &out.0[HEADER..];
    let mut header = Writer::default();
    header
        .raw(MAGIC)
        .raw(id)
        .u64(number)
        .u64(payload.len() as u64)
        .raw(&check_of(payload));
    let check = blake3::derive_key(FRAME, &header.0);
    header.raw(&check);
    out.0[..HEADER].copy_from_slice(&header.0);
    out.0
}

/// Finds what was not written whole; what the values say is checked by their own seals.
fn check_of(payload: &[u8]) -> [u8; 16] {
    xxh3_128(payload).to_le_bytes()
}

fn decode(payload: &[u8]) -> Result<Vec<Batch>, String> {
    let mut from = Reader::new(payload);
    let key = |from: &mut Reader<'_>| {
        let byte = from.u8("kind")?;
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == byte);
        let kind = kind.ok_or_else(|| format!("the kind is {byte}"))?;
        let id = from.array("id")?;
        Ok::<_, String>(Key { kind, id })
    };
    let mut batches = Vec::new();
    for _ in 0..from.count(50, "changes")? {
        let group = Group(from.array("group")?);
        let clear = from.u8("flag")? != 0;
        let head = match from.u8("head's flag")? {
            0 => HeadChange::Keep,
            1 => HeadChange::Put(from.bytes(payload.len(), "head")?.to_vec()),
            2 => HeadChange::Remove,
            other => return Err(format!("the head's flag is {other}, expected 0, 1 or 2")),
        };
        let mut deletes = Vec::new();
        for _ in 0..from.count(33, "deletes")? {
            deletes.push(key(&mut from)?);
        }
        let mut puts = Vec::new();
        for _ in 0..from.count(41, "puts")? {
            let key = key(&mut from)?;
            puts.push((key, from.bytes(payload.len(), "value")?.to_vec()));
        }
        batches.push(Batch {
            group,
            expected: None,
            clear,
            head,
            deletes,
            puts,
        });
    }
    from.end()?;
    Ok(batches)
}

/// A frame's header that has its check.
struct Header {
    at: u64,
    id: [u8; 16],
    number: u64,
    length: u64,
    check: [u8; 16],
}

impl Header {
    fn end(&self) -> u64 {
        (self.at + HEADER as u64 + self.length).next_multiple_of(ALIGN)
    }
}

/// The header at a place; `None` where there is none, or one that leads beyond the file's end.
fn header(file: &dyn StorageBackend, at: u64, length: u64) -> io::Result<Option<Header>> {
    if at.checked_add(HEADER as u64).is_none_or(|end| end > length) {
        return Ok(None);
    }
    let mut bytes = [0; HEADER];
    file.read(at, &mut bytes)?;
    let (content, check) = bytes.split_at(HEADER - 32);
    if content[..8] != *MAGIC || *check != blake3::derive_key(FRAME, content) {
        return Ok(None);
    }
    let mut from = Reader::new(&content[8..]);
    let read = |from: &mut Reader<'_>| {
        Ok::<_, String>(Header {
            at,
            id: from.array("id")?,
            number: from.u64("number")?,
            length: from.u64("length")?,
            check: from.array("check")?,
        })
    };
    let found = read(&mut from).map_err(io::Error::other)?;
    let room = length - at - HEADER as u64;
    Ok((found.length <= room).then_some(found))
}

/// What a frame says; `None` where its payload is not what was written.
fn content(file: &dyn StorageBackend, header: &Header) -> io::Result<Option<Vec<Batch>>> {
    let mut payload = vec![0; usize::try_from(header.length).map_err(io::Error::other)?];
    file.read(header.at + HEADER as u64, &mut payload)?;
    if check_of(&payload) != header.check {
        return Ok(None);
    }
    Ok(decode(&payload).ok())
}

/// What a journal holds for its database.
#[derive(Debug)]
pub(super) struct Contents {
    /// Changes that are not in the tree, in their order.
    pub batches: Vec<Batch>,
    /// The number of the last frame, in the tree or not.
    pub last: u64,
    /// Where the next frame goes.
    pub end: u64,
}

/// Why a journal's frames cannot be taken.
#[derive(Debug)]
pub(super) enum Trouble {
    Io(io::Error),
    /// Frames that were acknowledged cannot be read.
    Damaged(String),
    /// The journal is another database's, or of another time.
    Foreign(String),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reads the frames from the beginning on. `mark`: what the database says of its journal, if it ever had one.
pub(super) fn read(file: &dyn StorageBackend, mark: Option<Mark>) -> Result<Contents, Trouble> {
    let length = file.len()?;
    if !length.is_multiple_of(STEP) {
        return Err(Trouble::Damaged(format!(
            "it has {length} bytes, expected a multiple of {STEP}: it was cut"
        )));
    }
    let applied = mark.map_or(0, |mark| mark.applied);
    let ours = |found: &Header| mark.is_some_and(|mark| mark.id == found.id);
    let mut contents = Contents {
        batches: Vec::new(),
        last: applied,
        end: 0,
    };
    let mut chain: Option<u64> = None;
    while let Some(found) = header(file, contents.end, length)? {
        if chain.is_none() && !ours(&found) {
            return Err(Trouble::Foreign("belongs to another file".into()));
        }
        if chain.is_none() && found.number > applied + 1 {
            let what = format!(
                "begins with change {}, and the file ends with change {applied}: the file is older than its journal",
                found.number
            );
            return Err(Trouble::Foreign(what));
        }
        if !ours(&found) || chain.is_some_and(|last| found.number != last + 1) {
            break;
        }
        let Some(batches) = content(file, &found)? else {
            break;
        };
        if found.number > applied {
            contents.batches.extend(batches);
        }
        chain = Some(found.number);
        contents.end = found.end();
    }
    contents.last = applied.max(chain.unwrap_or(0));
    // A frame is written when the one before is synced. So one that is newer than what comes next here means that something between
    // was there and is lost; and what comes next stands here or nowhere.
    let next = contents.last + 1;
    for at in (contents.end..length).step_by(usize::try_from(ALIGN).map_err(io::Error::other)?) {
        let Some(found) = header(file, at, length)? else {
            continue;
        };
        if ours(&found) && (found.number > next || found.number == next && at != contents.end) {
            return Err(Trouble::Damaged(format!(
                "change {next} at byte {} cannot be read, and change {} behind it can",
                contents.end, found.number
            )));
        }
    }
    if contents.last == applied {
        // Nothing of it is needed: it begins anew.
        contents.end = 0;
    }
    Ok(contents)
}

/// Every frame that can be read, wherever it stands, in the order of numbers; those of one journal only, if it is known.
pub(super) fn search(file: &dyn StorageBackend, id: Option<[u8; 16]>) -> io::Result<Vec<(u64, Vec<Batch>)>> {
    let length = file.len()?;
    let mut frames = Vec::new();
    for at in (0..length).step_by(usize::try_from(ALIGN).map_err(io::Error::other)?) {
        if let Some(found) = header(file, at, length)?
            && id.is_none_or(|id| id == found.id)
            && let Some(batches) = content(file, &found)?
        {
            frames.push((found.number, batches));
        }
    }
    frames.sort_by_key(|(number, _)| *number);
    Ok(frames)
}

/// A journal that is open for writing.
#[derive(Debug)]
pub(super) struct Journal {
    file: Box<dyn StorageBackend>,
    /// Where the next frame goes.
    end: u64,
    length: u64,
    /// Kept from frame to frame: taking it anew costs more than filling it.
    room: Vec<u8>,
}

/// The longest buffer that is kept.
const ROOM: usize = 1 << 20;

impl Journal {
    pub(super) fn new(file: Box<dyn StorageBackend>, end: u64) -> io::Result<Self> {
        let length = file.len()?;
        Ok(Self {
            file,
            end,
            length,
            room: Vec::new(),
        })
    }

    /// A buffer for the next frame.
    pub(super) fn room(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.room)
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Writes a frame behind the last one; it is durable when this returns.
    pub(super) fn append(&mut self, frame: Vec<u8>) -> io::Result<()> {
        let end = self.end + frame.len() as u64;
        if end > self.length {
            let length = end.next_multiple_of(STEP);
            self.file.set_len(length)?;
            self.length = length;
        }
        self.file.write(self.end, &frame)?;
        self.file.sync_data()?;
        self.end = end.next_multiple_of(ALIGN);
        if frame.capacity() <= ROOM {
            self.room = frame;
        }
        Ok(())
    }

    /// The next frame goes to the beginning: all that stand there are in the tree.
    pub(super) fn begin_anew(&mut self) {
        self.end = 0;
    }

    /// Makes what was read durable: a process that was killed may have written it and not synced.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Whether the frames on the disk still say what they should; what is amiss if not.
    pub(super) fn check(&self, mark: Mark, last: u64) -> Result<(), Trouble> {
        let found = read(&*self.file, Some(mark))?;
        if found.last != last {
            return Err(Trouble::Damaged(format!(
                "it ends with change {}, and {last} was acknowledged",
                found.last
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use proptest::prelude::*;
    use redb::backends::InMemoryBackend;

    use super::*;

    const MARK: Mark = Mark {
        id: [7; 16],
        applied: 0,
        open: true,
    };

    fn batch(seed: u8, size: usize) -> Batch {
        let kind = Kind::ALL[usize::from(seed) % 3];
        let key = |n| Key { kind, id: [n; 32] };
        Batch {
            group: Group([seed; 32]),
            expected: None,
            clear: seed.is_multiple_of(5),
            head: match seed % 3 {
                0 => HeadChange::Keep,
                1 => HeadChange::Put(vec![seed; size / 3]),
                _ => HeadChange::Remove,
            },
            deletes: (0..seed % 4).map(key).collect(),
            puts: vec![(key(9), vec![seed; size]), (key(10), Vec::new())],
        }
    }

    fn file() -> Box<dyn StorageBackend> {
        Box::new(InMemoryBackend::new())
    }

    /// The bytes of a journal with a frame for each of `batches`, and where each frame begins.
    fn journal(mark: Mark, batches: &[Vec<Batch>]) -> (Vec<u8>, Vec<u64>) {
        let mut journal = Journal::new(file(), 0).unwrap();
        let mut places = Vec::new();
        for (number, batches) in (mark.applied + 1..).zip(batches) {
            places.push(journal.end());
            let room = journal.room();
            journal.append(frame(room, &mark.id, number, batches)).unwrap();
        }
        (bytes_of(&*journal.file), places)
    }

    fn bytes_of(file: &dyn StorageBackend) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
        file.read(0, &mut bytes).unwrap();
        bytes
    }

    fn of(bytes: &[u8]) -> Box<dyn StorageBackend> {
        let file = file();
        file.set_len(bytes.len() as u64).unwrap();
        file.write(0, bytes).unwrap();
        file
    }

    fn five() -> Vec<Vec<Batch>> {
        (1..6)
            .map(|n| vec![batch(n, 40 * usize::from(n)), batch(n + 7, 3)])
            .collect()
    }

    proptest! {
        #[test]
        fn frames_say_what_was_put_into_them(frames in prop::collection::vec(prop::collection::vec((any::<u8>(), 0..3_000usize), 0..4), 0..6), applied in 0..99u64) {
            let frames: Vec<Vec<Batch>> = frames.iter().map(|each| each.iter().map(|(seed, size)| batch(*seed, *size)).collect()).collect();
            let mark = Mark { applied, ..MARK };
            let (bytes, _) = journal(mark, &frames);
            let found = read(&*of(&bytes), Some(mark)).unwrap();
            prop_assert_eq!(found.batches, frames.concat());
            prop_assert_eq!(found.last, applied + frames.len() as u64);
            // What the tree has already is left out.
            for done in 0..frames.len() {
                let mark = Mark { applied: applied + done as u64, ..MARK };
                prop_assert_eq!(read(&*of(&bytes), Some(mark)).unwrap().batches, frames[done..].concat());
            }
        }
    }

    #[test]
    fn a_flipped_bit_costs_nothing_that_was_acknowledged_without_a_word() {
        let frames = five();
        let (good, places) = journal(MARK, &frames);
        let last = usize::try_from(*places.last().unwrap()).unwrap();
        let used = usize::try_from(read(&*of(&good), Some(MARK)).unwrap().end).unwrap();
        let mut refused = 0;
        for bit in 0..used * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            match read(&*of(&bad), Some(MARK)) {
                Ok(found) if found.batches == frames.concat() => {}
                // The last frame looks like one whose writing was cut off: that cannot be told apart.
                Ok(found) => assert!(
                    bit / 8 >= last && found.batches == frames[..4].concat(),
                    "bit {bit}"
                ),
                Err(Trouble::Damaged(_)) => refused += 1,
                Err(other) => panic!("bit {bit}: {other:?}"),
            }
        }
        assert!(refused > 4 * 200 * 8, "{refused} flips were noticed");
        for length in [1, 511, 513, last, good.len() - 1] {
            assert!(
                matches!(read(&*of(&good[..length]), Some(MARK)), Err(Trouble::Damaged(_))),
                "cut at {length}"
            );
        }
    }

    #[test]
    fn what_was_not_written_whole_is_as_if_it_were_not_there_and_is_written_over() {
        let frames = five();
        let (good, places) = journal(MARK, &frames);
        let last = usize::try_from(places[4]).unwrap();
        let end = usize::try_from(read(&*of(&good), Some(MARK)).unwrap().end).unwrap();
        for kept in last..end - 1 {
            let mut torn = good.clone();
            torn[kept..].fill(0);
            let found = read(&*of(&torn), Some(MARK)).unwrap();
            if found.last == 4 {
                assert_eq!((found.batches, found.end), (frames[..4].concat(), places[4]));
            } else {
                assert_eq!(found.batches, frames.concat(), "only padding was cut off");
            }
        }
        let mut torn = good;
        torn[last + HEADER + 30] ^= 1;
        let file = of(&torn);
        let mut journal = Journal::new(file, places[4]).unwrap();
        journal
            .append(frame(Vec::new(), &MARK.id, 5, &[batch(3, 9)]))
            .unwrap();
        let found = read(&*journal.file, Some(MARK)).unwrap();
        assert_eq!(found.batches, [frames[..4].concat(), vec![batch(3, 9)]].concat());
    }

    #[test]
    fn a_journal_that_begins_anew_leaves_its_old_frames_behind() {
        let frames = five();
        let (bytes, _) = journal(MARK, &frames);
        let file = of(&bytes);
        let mark = Mark { applied: 5, ..MARK };
        assert_eq!(
            read(&*file, Some(mark)).unwrap().end,
            0,
            "nothing of it is needed"
        );
        let mut journal = Journal::new(file, 0).unwrap();
        journal
            .append(frame(Vec::new(), &MARK.id, 6, &[batch(3, 9)]))
            .unwrap();
        let found = read(&*journal.file, Some(mark)).unwrap();
        assert_eq!((found.batches, found.last), (vec![batch(3, 9)], 6));
        // The number of a frame that failed is given up.
        assert!(matches!(journal.check(mark, 7), Err(Trouble::Damaged(_))));
        journal.check(mark, 6).unwrap();
    }

    #[test]
    fn another_files_journal_and_one_that_is_too_new_are_refused() {
        let (bytes, _) = journal(Mark { applied: 8, ..MARK }, &five());
        for mark in [
            None,
            Some(Mark { id: [8; 16], ..MARK }),
            Some(Mark { applied: 7, ..MARK }),
        ] {
            let trouble = read(&*of(&bytes), mark).unwrap_err();
            assert!(matches!(trouble, Trouble::Foreign(_)), "{mark:?}: {trouble:?}");
        }
        assert!(read(&*file(), None).unwrap().batches.is_empty());
        assert!(read(&*of(&vec![0; 1 << 20]), None).unwrap().batches.is_empty());
    }

    #[test]
    fn a_search_takes_every_frame_that_is_whole() {
        let frames = five();
        let (mut bytes, places) = journal(MARK, &frames);
        bytes[usize::try_from(places[2]).unwrap() + 8] ^= 1;
        let found = search(&*of(&bytes), Some(MARK.id)).unwrap();
        let numbers: Vec<u64> = found.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [1, 2, 4, 5]);
        assert_eq!(found[2].1, frames[3]);
        assert_eq!(search(&*of(&bytes), Some([8; 16])).unwrap().len(), 0);
    }
}
