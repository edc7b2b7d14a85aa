//! Sizes, limits and the fixed-width records, each with its encoding. `docs/image-format.md` is the text to this code.

use serde::{Deserialize, Serialize};

/// Name of the file in its directory.
pub const FILE_NAME: &str = "checkpoint.img";
/// Format version written by this crate. Readers refuse another major and accept any minor.
pub const MAJOR: u16 = 1;
/// The newest minor version that this crate knows, see [`MAJOR`]. An image has the lowest that describes it.
pub const MINOR: u16 = 3;
/// The unit of the page area: alignment and length of a page run.
pub const PAGE_SIZE: u32 = 4096;
/// One checksum covers this many bytes of the data area.
pub const BLOCK_SIZE: usize = 1 << 20;
/// Most bytes in the data area.
pub const MAX_DATA: u64 = 1 << 44;
/// Most bytes in one JSON section.
pub const MAX_JSON: u64 = 256 << 20;
/// Most records in the page index.
pub const MAX_RUNS: u64 = 1 << 26;
/// Most sections, the page index included.
pub const MAX_SECTIONS: u32 = 1024;
/// Most images in a chain: the image itself, its parent, and so on.
pub const MAX_CHAIN: usize = 128;
/// Most bytes in the name of a section.
pub const MAX_NAME: usize = 32;

pub(crate) const PAGE: u64 = PAGE_SIZE as u64;
pub(crate) const MAGIC: [u8; 8] = *b"\x89TORPOR\n";
pub(crate) const END_MAGIC: [u8; 8] = *b"\x89TRPEND\n";
pub(crate) const HEADER_LEN: usize = 4096;
/// Where the data area begins.
pub(crate) const DATA_START: u64 = HEADER_LEN as u64;
pub(crate) const RUN_LEN: usize = 32;
pub(crate) const FRAME_LEN: usize = 32;
/// Most frames: a data area of [`MAX_DATA`] bytes has no more blocks.
pub(crate) const MAX_FRAMES: u64 = MAX_DATA / BLOCK_SIZE as u64;
pub(crate) const ENTRY_LEN: usize = 64;
pub(crate) const TRAILER_LEN: usize = 64;
/// Bytes of the trailer that the digest covers; the digest itself and what follows it are compared, not hashed.
pub(crate) const TRAILER_DIGESTED: usize = 32;
/// Blobs, sections and the footer begin at multiples of this.
pub(crate) const ALIGN: u64 = 8;
/// The bits of an offset from here on up number the image of the chain that it is in.
pub(crate) const LINK_SHIFT: u32 = 48;
pub(crate) const INDEX_NAME: &str = "pages";
pub(crate) const FRAMES_NAME: &str = "frames";

/// Readers that do not know the kind of a section with this flag must refuse the image.
pub(crate) const SECTION_MUST_KNOW: u32 = 1;

pub(crate) fn align_up(offset: u64, align: u64) -> u64 {
    offset.next_multiple_of(align)
}

/// Which image of the chain an offset is in, and the offset there.
pub(crate) fn link_of(offset: u64) -> (usize, u64) {
    ((offset >> LINK_SHIFT) as usize, offset & ((1 << LINK_SHIFT) - 1))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

/// Where a blob lies in the file. The engine keeps it inside its metadata.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlobRef {
    /// File offset, a multiple of 8.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// One record of the page index: `pages` pages of `space` from `start` on are found at `offset` in the file, or are zero.
///
/// The order of the fields is the order of the index: by space, then by start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    /// Number of the address space or of the shared memory object. The engine numbers both from one sequence.
    pub space: u32,
    /// Virtual address, or offset in the object, in bytes.
    pub start: u64,
    /// Length in pages, at least one.
    pub pages: u64,
    /// Where the first page is in the data area; 0 in a run without data. The upper 16 bits say in which image of the chain: 0 for
    /// this one, 1 for its parent, 2 for the parent's parent. [`crate::Reader`] takes such offsets in all its methods.
    pub offset: u64,
    /// See [`PageRun::ZERO`]; all other bits are 0.
    pub flags: u32,
}

impl PageRun {
    /// The pages read as zero and have no data in the file.
    pub const ZERO: u32 = 1;
    /// All flags that this version knows.
    pub(crate) const KNOWN: u32 = Self::ZERO;

    /// A run with its pages at `offset` in the file, as [`crate::Writer::append_pages`] returned it.
    pub fn data(space: u32, start: u64, offset: u64, pages: u64) -> PageRun {
        PageRun {
            space,
            start,
            pages,
            offset,
            flags: 0,
        }
    }

    /// A run of zero pages.
    pub fn zero(space: u32, start: u64, pages: u64) -> PageRun {
        PageRun {
            space,
            start,
            pages,
            offset: 0,
            flags: Self::ZERO,
        }
    }

    /// Whether the run has no data in the file.
    pub fn is_zero(&self) -> bool {
        self.flags & Self::ZERO != 0
    }

    /// In which image of the chain the pages are: 0 for this one, 1 for its parent.
    pub fn link(&self) -> usize {
        link_of(self.offset).0
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages.saturating_mul(PAGE)
    }

    /// First address after the run.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes())
    }

    pub(crate) fn encode(&self) -> [u8; RUN_LEN] {
        let mut raw = [0; RUN_LEN];
        raw[0..4].copy_from_slice(&self.space.to_le_bytes());
        raw[4..8].copy_from_slice(&self.flags.to_le_bytes());
        raw[8..16].copy_from_slice(&self.start.to_le_bytes());
        raw[16..24].copy_from_slice(&self.offset.to_le_bytes());
        raw[24..32].copy_from_slice(&self.pages.to_le_bytes());
        raw
    }

    pub(crate) fn decode(raw: &[u8]) -> PageRun {
        PageRun {
            space: u32_at(raw, 0),
            flags: u32_at(raw, 4),
            start: u64_at(raw, 8),
            offset: u64_at(raw, 16),
            pages: u64_at(raw, 24),
        }
    }

    /// The part of this run from `start` to `end`, which overlaps it.
    pub(crate) fn part(&self, start: u64, end: u64) -> PageRun {
        let (start, end) = (start.max(self.start), end.min(self.end()));
        PageRun {
            start,
            pages: (end - start) / PAGE,
            offset: if self.is_zero() {
                0
            } else {
                self.offset + (start - self.start)
            },
            ..*self
        }
    }

    /// Checks the record by itself. Says what is wrong.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        if self.flags & !Self::KNOWN != 0 {
            return Err("unknown flags");
        }
        if self.pages == 0 {
            return Err("no pages");
        }
        let bytes = self.pages.checked_mul(PAGE).ok_or("length out of range")?;
        if self.start % PAGE != 0 || self.start.checked_add(bytes).is_none() {
            return Err("address out of range or not aligned to a page");
        }
        if self.is_zero() && self.offset != 0 {
            return Err("zero pages with an offset");
        }
        if self.offset % PAGE != 0 {
            return Err("offset not aligned to a page");
        }
        Ok(())
    }

    /// Checks that the pages are in a data area: `ends` are the ends of those of the chain. The record was checked by itself.
    pub(crate) fn check_place(&self, ends: &[u64]) -> Result<(), &'static str> {
        if self.is_zero() {
            return Ok(());
        }
        let (link, offset) = link_of(self.offset);
        let data_end = *ends.get(link).ok_or("pages in an image that is not in the chain")?;
        match offset.checked_add(self.bytes()) {
            Some(end) if offset >= DATA_START && end <= data_end => Ok(()),
            _ => Err("pages outside the data area"),
        }
    }

    /// Appends `next` to this run if it goes on where this one ends, in memory and in the file.
    pub(crate) fn absorb(&mut self, next: &PageRun) -> bool {
        let bytes = self.pages.checked_mul(PAGE);
        let adjacent = |from: u64, to: u64| bytes.and_then(|bytes| from.checked_add(bytes)) == Some(to);
        let joined = self.space == next.space
            && self.flags == next.flags
            && adjacent(self.start, next.start)
            && (self.is_zero() || adjacent(self.offset, next.offset));
        match self.pages.checked_add(next.pages) {
            Some(pages) if joined => {
                self.pages = pages;
                true
            }
            _ => false,
        }
    }
}

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SectionKind {
    /// A JSON document.
    Json,
    /// The page index.
    Index,
    /// Where each block of a compressed data area is stored.
    Frames,
    /// Something that a newer version added.
    Unknown(u32),
}

impl SectionKind {
    pub(crate) fn number(self) -> u32 {
        match self {
            SectionKind::Json => 1,
            SectionKind::Index => 2,
            SectionKind::Frames => 3,
            SectionKind::Unknown(number) => number,
        }
    }

    pub(crate) fn from_number(number: u32) -> SectionKind {
        match number {
            1 => SectionKind::Json,
            2 => SectionKind::Index,
            3 => SectionKind::Frames,
            other => SectionKind::Unknown(other),
        }
    }
}

/// One section as the footer lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionInfo {
    /// Name, unique in the image: 1 to 32 characters of `a-z 0-9 . _ -`.
    pub name: String,
    /// What it holds.
    pub kind: SectionKind,
    /// File offset.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    pub(crate) flags: u32,
    pub(crate) checksum: u64,
}

impl SectionInfo {
    pub(crate) fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut raw = [0; ENTRY_LEN];
        raw[0..4].copy_from_slice(&self.kind.number().to_le_bytes());
        raw[4..8].copy_from_slice(&self.flags.to_le_bytes());
        raw[8..16].copy_from_slice(&self.offset.to_le_bytes());
        raw[16..24].copy_from_slice(&self.len.to_le_bytes());
        raw[24..32].copy_from_slice(&self.checksum.to_le_bytes());
        raw[32..32 + self.name.len()].copy_from_slice(self.name.as_bytes());
        raw
    }

    /// `None` when the name is not one.
    pub(crate) fn decode(raw: &[u8]) -> Option<SectionInfo> {
        let field = &raw[32..ENTRY_LEN];
        let len = field.iter().position(|&byte| byte == 0).unwrap_or(MAX_NAME);
        let (name, padding) = field.split_at(len);
        let name = std::str::from_utf8(name).ok()?;
        if !is_name(name) || padding.iter().any(|&byte| byte != 0) {
            return None;
        }
        Some(SectionInfo {
            name: name.to_owned(),
            kind: SectionKind::from_number(u32_at(raw, 0)),
            flags: u32_at(raw, 4),
            offset: u64_at(raw, 8),
            len: u64_at(raw, 16),
            checksum: u64_at(raw, 24),
        })
    }
}

/// Whether `name` may name a section.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
}

/// The last 64 bytes of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub data_len: u64,
    pub file_len: u64,
    pub block_count: u64,
    pub section_count: u32,
    pub block_size: u32,
    pub digest: u128,
}

impl Trailer {
    /// Length of the footer: both tables and the trailer.
    pub(crate) fn footer_len(&self) -> Option<u64> {
        let sections = u64::from(self.section_count) * ENTRY_LEN as u64;
        self.block_count
            .checked_mul(8)?
            .checked_add(sections)?
            .checked_add(TRAILER_LEN as u64)
    }

    /// Blocks in a data area of `data_len` bytes.
    pub(crate) fn blocks_of(data_len: u64) -> u64 {
        data_len.div_ceil(BLOCK_SIZE as u64)
    }

    pub(crate) fn encode(&self) -> [u8; TRAILER_LEN] {
        let mut raw = [0; TRAILER_LEN];
        raw[0..8].copy_from_slice(&self.data_len.to_le_bytes());
        raw[8..16].copy_from_slice(&self.file_len.to_le_bytes());
        raw[16..24].copy_from_slice(&self.block_count.to_le_bytes());
        raw[24..28].copy_from_slice(&self.section_count.to_le_bytes());
        raw[28..32].copy_from_slice(&self.block_size.to_le_bytes());
        raw[32..48].copy_from_slice(&self.digest.to_le_bytes());
        raw[48..56].copy_from_slice(&self.footer_len().unwrap_or(0).to_le_bytes());
        raw[56..64].copy_from_slice(&END_MAGIC);
        raw
    }

    /// The trailer, and the footer length that it states.
    pub(crate) fn decode(raw: &[u8; TRAILER_LEN]) -> Result<(Trailer, u64), &'static str> {
        if raw[56..64] != END_MAGIC {
            return Err("the end mark is missing: the file is truncated or has bytes appended");
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(&raw[32..48]);
        let trailer = Trailer {
            data_len: u64_at(raw, 0),
            file_len: u64_at(raw, 8),
            block_count: u64_at(raw, 16),
            section_count: u32_at(raw, 24),
            block_size: u32_at(raw, 28),
            digest: u128::from_le_bytes(digest),
        };
        Ok((trailer, u64_at(raw, 48)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_32_bytes_in_the_documented_order() {
        let run = PageRun {
            space: 0x0403_0201,
            flags: 1,
            start: 0x1000,
            offset: 0x2000,
            pages: 3,
        };
        let raw = run.encode();
        assert_eq!(raw[..8], [1, 2, 3, 4, 1, 0, 0, 0]);
        assert_eq!(u64_at(&raw, 8), 0x1000);
        assert_eq!(u64_at(&raw, 16), 0x2000);
        assert_eq!(u64_at(&raw, 24), 3);
        assert_eq!(PageRun::decode(&raw), run);
    }

    #[test]
    fn runs_join_only_when_memory_and_file_both_go_on() {
        let mut run = PageRun::data(1, 0x10000, 0x5000, 2);
        assert!(!run.absorb(&PageRun::data(2, 0x12000, 0x7000, 1)));
        assert!(!run.absorb(&PageRun::data(1, 0x12000, 0x8000, 1)));
        assert!(!run.absorb(&PageRun::data(1, 0x13000, 0x7000, 1)));
        assert!(!run.absorb(&PageRun::zero(1, 0x12000, 1)));
        assert!(run.absorb(&PageRun::data(1, 0x12000, 0x7000, 1)));
        assert_eq!(run, PageRun::data(1, 0x10000, 0x5000, 3));
        let mut zero = PageRun::zero(1, 0, 1);
        assert!(zero.absorb(&PageRun::zero(1, 0x1000, 4)));
        assert_eq!(zero, PageRun::zero(1, 0, 5));
    }

    #[test]
    fn runs_outside_the_data_area_are_refused() {
        let end = DATA_START + 4 * PAGE;
        let check = |run: PageRun| run.check().and_then(|()| run.check_place(&[end, end + PAGE]));
        assert!(check(PageRun::data(0, 0, DATA_START, 4)).is_ok());
        assert!(check(PageRun::data(0, 0, DATA_START, 5)).is_err());
        assert!(check(PageRun::data(0, 0, 0, 1)).is_err());
        let parents = |pages| PageRun::data(0, 0, (1 << LINK_SHIFT) + DATA_START, pages);
        assert!(check(parents(5)).is_ok() && check(parents(6)).is_err());
        assert!(check(PageRun::data(0, 0, (2 << LINK_SHIFT) + DATA_START, 1)).is_err());
        assert!(check(PageRun::data(0, 0, DATA_START + 1, 1)).is_err());
        assert!(check(PageRun::data(0, 1, DATA_START, 1)).is_err());
        assert!(check(PageRun::data(0, 0, DATA_START, 0)).is_err());
        assert!(check(PageRun::data(0, 0, DATA_START, u64::MAX / PAGE)).is_err());
        assert!(check(PageRun::data(0, 0, DATA_START, u64::MAX)).is_err());
        assert!(check(PageRun::data(0, 0, u64::MAX - PAGE + 1, 1)).is_err());
        assert!(check(PageRun::zero(0, u64::MAX - PAGE + 1, 1)).is_err());
        assert!(
            check(PageRun {
                flags: 2,
                ..PageRun::data(0, 0, DATA_START, 1)
            })
            .is_err()
        );
        assert!(
            check(PageRun {
                offset: DATA_START,
                ..PageRun::zero(0, 0, 1)
            })
            .is_err()
        );
    }

    #[test]
    fn names_are_small_and_printable() {
        assert!(is_name("container") && is_name("a") && is_name(&"x".repeat(MAX_NAME)));
        assert!(!is_name("") && !is_name("A") && !is_name("a\n") && !is_name(&"x".repeat(MAX_NAME + 1)));
    }
}
