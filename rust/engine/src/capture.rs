//! The bytes of memory, from the stopped processes into the image: one pass, in large pieces, zero pages left out.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use torpor_image::{PageRun, Share, Writer};
use torpor_sys::PAGE_SIZE;
use torpor_sys::fd;
use torpor_sys::pagemap::Pagemap;

use crate::base::{self, Base};
use crate::collect::Collected;
use crate::common::Common;
use crate::error::{About, Error, Result};
use crate::kinds::memory::{self, Area, Source};
use crate::model::Inventory;
use crate::stage::{Cancel, Stage};

/// Address spaces are numbered by process; shared objects from here on.
pub const SHARED: u32 = 1 << 31;

/// How many bytes are copied at once.
const PIECE: usize = 4 << 20;

/// What was captured.
#[derive(Debug, Default)]
pub struct Captured {
    /// Pages with data.
    pub pages: u64,
    /// Pages that held nothing but zeroes.
    pub zeroes: u64,
    /// Pages that are those of the parent.
    pub inherited: u64,
    /// Pages that processes have in common: to be told to the writer when all else is there.
    pub shares: Vec<Share>,
}

/// Copies everything that `collected` found, from processes that stand still.
pub fn capture(collected: &Collected, base: &Base, writer: &mut Writer, cancel: &Cancel) -> Result<Captured> {
    let mut captured = in_pause(collected, base, writer, cancel)?;
    captured.add(&from(collected, base, Some, writer, cancel)?);
    Ok(captured)
}

/// Copies what a twin does not have: shared objects, which would change under it, and areas that are not inherited.
pub fn in_pause(collected: &Collected, base: &Base, writer: &mut Writer, cancel: &Cancel) -> Result<Captured> {
    let own = collected.sources.len() == 1;
    pump(base, writer, cancel, |pump| {
        let mut extents = Vec::new();
        for source in &collected.sources {
            let ranges = private(&collected.inventory, base, source.index, source.pid, |area| {
                !area.is_inherited()
            })?;
            extents.extend(Extent::private(source.index, source.pid, own, ranges));
        }
        let states = &collected.inventory.objects.shared;
        for (index, (file, state)) in collected.shared.iter().zip(states).enumerate() {
            extents.push(Extent::shared(SHARED + index as u32, file, state.size)?);
        }
        pump.copy(&extents)
    })
}

/// Copies the rest of each address space from whoever `reader` says has it.
pub fn from(
    collected: &Collected,
    base: &Base,
    reader: impl Fn(i32) -> Option<i32>,
    writer: &mut Writer,
    cancel: &Cancel,
) -> Result<Captured> {
    let mut common = Common::of(collected, reader)?;
    let mut captured = pump(base, writer, cancel, |pump| pump.rest(collected, base, &mut common))?;
    captured.shares = common.shares().to_vec();
    Ok(captured)
}

/// Memory that was copied and is still to be written.
#[derive(Debug)]
pub struct Kept {
    pieces: Vec<Piece>,
    shares: Vec<Share>,
}

/// Copies the rest of each address space, which is little, from processes that stand still: writing it can wait until
/// they go on.
pub fn keep(collected: &Collected, base: &Base, cancel: &Cancel) -> Result<Kept> {
    let mut common = Common::of(collected, Some)?;
    let pump = Pump {
        cancel,
        buffers: Buffers::Stay(RefCell::default()),
    };
    pump.rest(collected, base, &mut common)?;
    let Buffers::Stay(pieces) = pump.buffers else {
        return Err(Error::nonsense("memory that was not kept"));
    };
    Ok(Kept {
        pieces: pieces.into_inner(),
        shares: common.shares().to_vec(),
    })
}

impl Kept {
    /// Writes it.
    pub fn store(self, base: &Base, writer: &mut Writer) -> Result<Captured> {
        let mut captured = Captured {
            shares: self.shares,
            ..Captured::default()
        };
        for piece in self.pieces {
            store(writer, base, &piece, &mut captured)?;
        }
        Ok(captured)
    }
}

impl Captured {
    /// Both together.
    pub fn add(&mut self, other: &Captured) {
        self.pages += other.pages;
        self.zeroes += other.zeroes;
        self.inherited += other.inherited;
        self.shares.extend_from_slice(&other.shares);
    }

    /// Pages that a process has in common with another.
    pub fn shared(&self) -> u64 {
        self.shares.iter().map(|s| (s.end - s.start) / PAGE_SIZE).sum()
    }
}

/// A piece of memory on its way to the image.
#[derive(Debug)]
struct Piece {
    space: u32,
    /// What is not stored would be a file's: zeroes are data.
    of_file: bool,
    /// (address, length) of what is in the buffer, one after another.
    ranges: Vec<(u64, u64)>,
    buffer: Vec<u8>,
}

/// What is to be copied of one space. All of it is found before any is copied: then it is known how much there is.
struct Extent<'c> {
    space: u32,
    of_file: bool,
    origin: Origin<'c>,
    ranges: Ranges,
}

/// Who has it.
enum Origin<'c> {
    /// `own`: no other process has any of its pages.
    Process {
        pid: i32,
        own: bool,
    },
    Shared(&'c OwnedFd),
}

/// The reading end: fills buffers and hands them over.
struct Pump<'c> {
    cancel: &'c Cancel,
    buffers: Buffers,
}

enum Buffers {
    /// To a writer, which gives them back.
    Go {
        full: SyncSender<Piece>,
        empty: Receiver<Vec<u8>>,
    },
    /// To nobody yet.
    Stay(RefCell<Vec<Piece>>),
}

/// Runs `read` here and a writer beside it, so that copying out of a process and into the file overlap. Three
/// buffers go round: that is all the memory it takes.
fn pump(
    base: &Base,
    writer: &mut Writer,
    cancel: &Cancel,
    read: impl FnOnce(&Pump<'_>) -> Result<()>,
) -> Result<Captured> {
    const BUFFERS: usize = 3;
    let (full, pieces) = sync_channel::<Piece>(BUFFERS);
    let (give_back, empty) = sync_channel(BUFFERS);
    for _ in 0..BUFFERS {
        give_back
            .send(vec![0; PIECE])
            .map_err(|_| Error::nonsense("no writer"))?;
    }
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || {
            let mut captured = Captured::default();
            for piece in pieces {
                store(writer, base, &piece, &mut captured)?;
                cancel.progress.advance(total(&piece.ranges));
                // The reader may have finished already.
                let _ = give_back.send(piece.buffer);
            }
            Ok(captured)
        });
        let buffers = Buffers::Go { full, empty };
        let pump = Pump { cancel, buffers };
        let read = read(&pump);
        drop(pump);
        let written = writing
            .join()
            .unwrap_or_else(|_| Err(Error::nonsense("the writer panicked")));
        // When the writer has failed, the reader only knows that it is gone.
        let captured = written?;
        read.map(|()| captured)
    })
}

impl Pump<'_> {
    fn send(
        &self,
        space: u32,
        of_file: bool,
        ranges: Vec<(u64, u64)>,
        fill: impl FnOnce(&[(u64, u64)], &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let gone = || Error::nonsense("the writer is gone");
        let len = total(&ranges) as usize;
        let mut buffer = match &self.buffers {
            Buffers::Go { empty, .. } => empty.recv().map_err(|_| gone())?,
            Buffers::Stay(_) => vec![0; len],
        };
        fill(&ranges, &mut buffer[..len])?;
        let piece = Piece {
            space,
            of_file,
            ranges,
            buffer,
        };
        match &self.buffers {
            Buffers::Go { full, .. } => full.send(piece).map_err(|_| gone()),
            Buffers::Stay(pieces) => {
                pieces.borrow_mut().push(piece);
                Ok(())
            }
        }
    }

    /// All that is private and that a twin has as well, but for what processes have in common and is copied already.
    fn rest(&self, collected: &Collected, base: &Base, common: &mut Common) -> Result<()> {
        let mut extents = Vec::new();
        for source in &collected.sources {
            let pid = common.reader(source.index)?;
            let ranges = private(&collected.inventory, base, source.index, pid, Area::is_inherited)?;
            let ranges = [
                common.take(source.index, &ranges[0])?,
                common.take(source.index, &ranges[1])?,
            ];
            // A twin has every page in common with its original.
            let own = pid == source.pid && collected.sources.len() == 1;
            extents.extend(Extent::private(source.index, pid, own, ranges));
        }
        self.copy(&extents)
    }

    fn copy(&self, extents: &[Extent<'_>]) -> Result<()> {
        let bytes = extents.iter().flat_map(|e| &e.ranges).map(|r| r.1 - r.0).sum();
        self.cancel.progress.expect(Stage::Capture, bytes);
        extents
            .iter()
            .filter(|e| !e.ranges.is_empty())
            .try_for_each(|extent| match extent.origin {
                Origin::Process { pid, own } => {
                    let memory = memory::open(pid)?;
                    self.copy_extent(extent, |ranges, out| {
                        let read = if own {
                            memory.gather(ranges, out)
                        } else {
                            memory.gather_common(ranges, out)
                        };
                        read.about(pid, "memory")
                    })
                }
                Origin::Shared(file) => {
                    let file = file
                        .try_clone()
                        .map_err(|e| torpor_sys::Error::io("dup", "shared object", &e));
                    let file = std::fs::File::from(file.about(0, "shared object")?);
                    self.copy_extent(extent, |ranges, out| read_ranges(&file, ranges, out))
                }
            })
    }

    fn copy_extent(&self, extent: &Extent<'_>, fill: impl Fn(&[(u64, u64)], &mut [u8]) -> Result<()>) -> Result<()> {
        for group in pieces(&extent.ranges) {
            self.cancel.check()?;
            self.send(extent.space, extent.of_file, group, &fill)?;
        }
        Ok(())
    }
}

impl<'c> Extent<'c> {
    /// What [`private`] has found.
    fn private(index: usize, pid: i32, own: bool, ranges: [Ranges; 2]) -> [Extent<'c>; 2] {
        let [memory, of_file] = ranges;
        [(false, memory), (true, of_file)].map(|(of_file, ranges)| Extent {
            space: index as u32,
            of_file,
            origin: Origin::Process { pid, own },
            ranges,
        })
    }

    /// The data of a shared object.
    fn shared(space: u32, file: &'c OwnedFd, size: u64) -> Result<Extent<'c>> {
        let ranges = fd::data_ranges(file, size).about(0, "shared object")?;
        let pages = |(start, end): (u64, u64)| (start & !(PAGE_SIZE - 1), end.next_multiple_of(PAGE_SIZE));
        Ok(Extent {
            space,
            of_file: false,
            origin: Origin::Shared(file),
            ranges: ranges.into_iter().map(pages).collect(),
        })
    }
}

/// Bytes in ranges (start, length).
fn total(ranges: &[(u64, u64)]) -> u64 {
    ranges.iter().map(|r| r.1).sum()
}

/// Start and end of ranges of addresses, sorted.
type Ranges = Vec<(u64, u64)>;

/// The ranges of an address space that hold data of its own, in the areas that are wanted: those of plain memory, and
/// those of files.
fn private(
    inventory: &Inventory,
    base: &Base,
    index: usize,
    pid: i32,
    wanted: impl Fn(&Area) -> bool,
) -> Result<[Ranges; 2]> {
    let mut ranges = [Ranges::new(), Ranges::new()];
    let Some(body) = &inventory.processes[index].body else {
        return Ok(ranges);
    };
    let known = base.known(index as u32);
    let mut pagemap = Pagemap::open(pid).about(pid, "pagemap")?;
    for area in body.memory.areas.iter().filter(|a| a.is_private() && wanted(a)) {
        let is_of_file = area.source != Source::Nothing;
        pagemap.only_anonymous(!is_of_file);
        let ranges = &mut ranges[usize::from(is_of_file)];
        match known {
            Some(known) => within(&known.pages.changed, area, ranges),
            None => pagemap
                .private_data(area.start, area.end, ranges)
                .about(pid, "pagemap")?,
        }
    }
    Ok(ranges)
}

/// Writes a piece's pages that are not zero, as runs that follow each other both in memory and in the file.
fn store(writer: &mut Writer, base: &Base, piece: &Piece, captured: &mut Captured) -> Result<()> {
    let old = base.compared_with(piece.space);
    let mut at = 0usize;
    for &(address, len) in &piece.ranges {
        let bytes = &piece.buffer[at..at + len as usize];
        for (is_zero, first, count) in runs(bytes) {
            let start = address + first as u64 * PAGE_SIZE;
            if is_zero && !piece.of_file {
                captured.zeroes += count as u64;
                continue;
            }
            let data = &bytes[first * PAGE_SIZE as usize..(first + count) * PAGE_SIZE as usize];
            match (writer.parent().cloned(), old) {
                (Some(parent), Some(old)) => {
                    for (is_old, first, count) in base::compare(&parent, old, start, data)? {
                        let start = start + first as u64 * PAGE_SIZE;
                        if is_old {
                            captured.inherited += writer.inherit((old, start), (piece.space, start), count as u64)?;
                        } else {
                            let data = &data[first * PAGE_SIZE as usize..(first + count) * PAGE_SIZE as usize];
                            append(writer, piece.space, start, data, captured)?;
                        }
                    }
                }
                _ => append(writer, piece.space, start, data, captured)?,
            }
        }
        at += len as usize;
    }
    Ok(())
}

fn append(writer: &mut Writer, space: u32, start: u64, data: &[u8], captured: &mut Captured) -> Result<()> {
    let count = data.len() as u64 / PAGE_SIZE;
    let offset = writer.append_pages(data)?;
    writer.push_run(PageRun::data(space, start, offset, count));
    captured.pages += count;
    Ok(())
}

/// The parts of sorted ranges that are in an area.
fn within(ranges: &[(u64, u64)], area: &Area, out: &mut Vec<(u64, u64)>) {
    let first = ranges.partition_point(|r| r.1 <= area.start);
    let touched = ranges[first..].iter().take_while(|r| r.0 < area.end);
    out.extend(touched.map(|r| (r.0.max(area.start), r.1.min(area.end))));
}

fn read_ranges(file: &std::fs::File, ranges: &[(u64, u64)], out: &mut [u8]) -> Result<()> {
    let mut at = 0;
    for &(offset, len) in ranges {
        read_to_end(file, offset, &mut out[at..at + len as usize])?;
        at += len as usize;
    }
    Ok(())
}

/// A file's last page may reach past its end: the rest is zeroes.
fn read_to_end(file: &std::fs::File, offset: u64, part: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < part.len() {
        let got = file
            .read_at(&mut part[done..], offset + done as u64)
            .map_err(|e| torpor_sys::Error::io("read", "shared object", &e))
            .about(0, "shared object")?;
        if got == 0 {
            part[done..].fill(0);
            return Ok(());
        }
        done += got;
    }
    Ok(())
}

/// Cuts and gathers ranges (start, end) into groups of (start, length) that fill a buffer.
fn pieces(ranges: &[(u64, u64)]) -> Vec<Vec<(u64, u64)>> {
    let mut groups = Vec::new();
    let mut group = Vec::new();
    let mut room = PIECE as u64;
    for &(mut start, end) in ranges {
        while start < end {
            let len = (end - start).min(room);
            group.push((start, len));
            start += len;
            room -= len;
            if room == 0 {
                groups.push(std::mem::take(&mut group));
                room = PIECE as u64;
            }
        }
    }
    if !group.is_empty() {
        groups.push(group);
    }
    groups
}

/// Neighbouring pages that are all zero or all not: (zero?, first page, count).
fn runs(bytes: &[u8]) -> Vec<(bool, usize, usize)> {
    let mut all: Vec<(bool, usize, usize)> = Vec::new();
    for (i, page) in bytes.chunks_exact(PAGE_SIZE as usize).enumerate() {
        let zero = is_zero(page);
        match all.last_mut() {
            Some(last) if last.0 == zero => last.2 += 1,
            _ => all.push((zero, i, 1)),
        }
    }
    all
}

fn is_zero(page: &[u8]) -> bool {
    // The first bytes of a page decide for most pages that are not zero.
    let (head, rest) = page.split_at(64);
    head.iter().all(|b| *b == 0) && rest.chunks_exact(64).all(|c| c.iter().fold(0, |or, b| or | b) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_fill_the_buffer_and_keep_every_byte() {
        let ranges = [(0, 3 * PIECE as u64 + 4096), (1 << 40, (1 << 40) + 8192)];
        let groups = pieces(&ranges);
        assert!(
            groups
                .iter()
                .all(|g| g.iter().map(|r| r.1).sum::<u64>() <= PIECE as u64)
        );
        let total: u64 = groups.iter().flatten().map(|r| r.1).sum();
        assert_eq!(total, 3 * PIECE as u64 + 4096 + 8192);
    }

    #[test]
    fn runs_tell_zero_from_data() {
        let mut bytes = vec![0u8; 4 * 4096];
        bytes[4096 + 4095] = 1;
        bytes[2 * 4096] = 1;
        assert_eq!(runs(&bytes), [(true, 0, 1), (false, 1, 2), (true, 3, 1)]);
    }
}
