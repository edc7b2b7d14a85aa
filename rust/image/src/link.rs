//! One file of a chain: opened, and all of it but its page index and its data blocks verified.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use nix::errno::Errno;
use nix::libc::O_NONBLOCK;

use crate::checksum::{self, Rolling};
use crate::error::Error;
use crate::header::HeaderInfo;
use crate::layout::{
    ALIGN, BLOCK_SIZE, DATA_START, ENTRY_LEN, FILE_NAME, HEADER_LEN, MAX_DATA, MAX_JSON, MAX_RUNS, MAX_SECTIONS, MINOR,
    RUN_LEN, SECTION_MUST_KNOW, SectionInfo, SectionKind, TRAILER_LEN, Trailer, align_up, u64_at,
};
use crate::write::digest;

const CHUNK: usize = 1 << 20;
const VERIFY_THREADS: usize = 4;
const FOOTER: &str = "footer";

/// One file. Offsets are those of this file.
#[derive(Debug)]
pub(crate) struct Link {
    file: File,
    path: PathBuf,
    len: u64,
    info: HeaderInfo,
    minor: u16,
    trailer: Trailer,
    sections: Vec<SectionInfo>,
    blocks: Vec<u64>,
}

impl Link {
    /// Opens a `checkpoint.img`, or the one in a directory.
    pub(crate) fn open(path: &Path) -> Result<Link, Error> {
        let (file, path, len) = open_file(path)?;
        let source = Source {
            file: &file,
            path: &path,
        };
        let mut header = vec![0; len.min(HEADER_LEN as u64) as usize];
        source.read("header", 0, &mut header)?;
        let (info, minor) = HeaderInfo::decode(&header, &path)?;
        info.check_known(&path)?;
        let (trailer, tables) = read_footer(&source, len, &header)?;
        let (entries, sums) = tables.split_at(trailer.section_count as usize * ENTRY_LEN);
        let sections = read_section_table(&path, entries, minor)?;
        check_sections(&source, &trailer, &sections)?;
        let blocks = sums.chunks_exact(8).map(|raw| u64_at(raw, 0)).collect();
        Ok(Link {
            file,
            path,
            len,
            info,
            minor,
            trailer,
            sections,
            blocks,
        })
    }

    /// Reads and checks the header page alone.
    pub(crate) fn peek(path: &Path) -> Result<HeaderInfo, Error> {
        let (file, path, len) = open_file(path)?;
        let mut header = vec![0; len.min(HEADER_LEN as u64) as usize];
        Source {
            file: &file,
            path: &path,
        }
        .read("header", 0, &mut header)?;
        Ok(HeaderInfo::decode(&header, &path)?.0)
    }

    pub(crate) fn info(&self) -> &HeaderInfo {
        &self.info
    }

    pub(crate) fn minor(&self) -> u16 {
        self.minor
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn digest(&self) -> String {
        format!("{:032x}", self.trailer.digest)
    }

    pub(crate) fn sections(&self) -> &[SectionInfo] {
        &self.sections
    }

    pub(crate) fn data_len(&self) -> u64 {
        self.trailer.data_len
    }

    /// Where the data area ends.
    pub(crate) fn data_end(&self) -> u64 {
        DATA_START + self.trailer.data_len
    }

    pub(crate) fn check_range(&self, offset: u64, len: u64) -> Result<(), Error> {
        match offset.checked_add(len) {
            Some(end) if offset >= DATA_START && end <= self.data_end() => Ok(()),
            _ => Err(self.corrupt(
                "data",
                format!("{len} bytes at offset {offset} are not in the data area"),
            )),
        }
    }

    /// Reads data without a look at checksums.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        self.check_range(offset, buf.len() as u64)?;
        self.source().read("data", offset, buf)
    }

    /// Reads and checks the block that holds `offset`; returns where it begins.
    pub(crate) fn read_block(&self, offset: u64, buffer: &mut Vec<u8>) -> Result<u64, Error> {
        let block = offset.checked_sub(DATA_START).map(|at| at / BLOCK_SIZE as u64);
        let known = block.filter(|&block| block < self.blocks.len() as u64);
        let block = known.ok_or_else(|| self.corrupt("data", format!("no data at offset {offset}")))?;
        self.load_block(block as usize, buffer)?;
        Ok(DATA_START + block * BLOCK_SIZE as u64)
    }

    /// Reads every data block and compares its checksum.
    pub(crate) fn verify(&self) -> Result<(), Error> {
        let available = thread::available_parallelism().map_or(1, |count| count.get());
        // A thread for less than 8 MiB costs more than it saves.
        let threads = available.min(VERIFY_THREADS).min(self.blocks.len() / 8).max(1);
        let next = AtomicU64::new(0);
        let mut failures: Vec<(u64, Error)> = thread::scope(|scope| {
            let workers: Vec<_> = (1..threads)
                .map(|_| scope.spawn(|| self.verify_blocks(&next)))
                .collect();
            let own = self.verify_blocks(&next);
            let others = workers.into_iter().map(|worker| worker.join());
            // A worker has nothing that panics; should it ever, its blocks count as not verified.
            let joined =
                others.map(|result| result.unwrap_or_else(|_| Err((0, self.corrupt("data", "verifying failed")))));
            joined.chain([own]).filter_map(Result::err).collect()
        });
        failures.sort_by_key(|(block, _)| *block);
        failures.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Takes block after block until none is left. Blocks are handed out in order, so the first failure of each worker is enough to
    /// find the first of all.
    fn verify_blocks(&self, next: &AtomicU64) -> Result<(), (u64, Error)> {
        let mut buffer = Vec::new();
        loop {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= self.blocks.len() as u64 {
                return Ok(());
            }
            if let Err(failed) = self.load_block(block as usize, &mut buffer) {
                // Later blocks need no look, earlier ones are already in the hands of others.
                next.fetch_max(self.blocks.len() as u64, Ordering::Relaxed);
                return Err((block, failed));
            }
        }
    }

    fn load_block(&self, block: usize, buffer: &mut Vec<u8>) -> Result<(), Error> {
        let begin = (block * BLOCK_SIZE) as u64;
        let len = (self.trailer.data_len - begin).min(BLOCK_SIZE as u64) as usize;
        buffer.resize(len, 0);
        let offset = DATA_START + begin;
        self.source().read("data", offset, buffer)?;
        if checksum::of(buffer) != self.blocks[block] {
            return Err(self.corrupt("data", format!("wrong checksum of the {len} bytes at offset {offset}")));
        }
        Ok(())
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source {
            file: &self.file,
            path: &self.path,
        }
    }

    pub(crate) fn corrupt(&self, section: impl Into<String>, detail: impl Into<String>) -> Error {
        Error::corrupt(&self.path, section, detail)
    }
}

/// The file with its name, for reads whose errors say where.
pub(crate) struct Source<'a> {
    file: &'a File,
    path: &'a Path,
}

impl Source<'_> {
    pub(crate) fn read(&self, section: &str, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        self.file
            .read_exact_at(buf, offset)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => self.corrupt(section, "the file became shorter while it was read"),
                _ => Error::io(self.path, "read", error),
            })
    }

    /// Hands a range over in chunks.
    pub(crate) fn stream(
        &self,
        section: &str,
        offset: u64,
        len: u64,
        mut take: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut buffer = vec![0; len.min(CHUNK as u64) as usize];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(CHUNK as u64) as usize;
            self.read(section, offset + done, &mut buffer[..piece])?;
            take(&buffer[..piece])?;
            done += piece as u64;
        }
        Ok(())
    }

    pub(crate) fn corrupt(&self, section: impl Into<String>, detail: impl Into<String>) -> Error {
        Error::corrupt(self.path, section, detail)
    }
}

pub(crate) fn named(name: &str) -> String {
    format!("section {name:?}")
}

/// Opens the image itself or the one in a directory.
fn open_file(path: &Path) -> Result<(File, PathBuf, u64), Error> {
    // O_NONBLOCK: a FIFO must be refused, not waited for.
    let open = |path: &Path| {
        let opened = OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(path);
        let file = opened.map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::ENOTDIR) => Error::Missing {
                path: path.to_path_buf(),
            },
            _ => Error::io(path, "open", error),
        })?;
        let found = file.metadata().map_err(|error| Error::io(path, "examine", error))?;
        Ok::<_, Error>((file, found))
    };
    let mut path = path.to_path_buf();
    let (mut file, mut found) = open(&path)?;
    if found.is_dir() {
        path.push(FILE_NAME);
        (file, found) = open(&path)?;
    }
    if !found.is_file() {
        return Err(Error::corrupt(&path, "file", "it is not a regular file"));
    }
    Ok((file, path, found.len()))
}

/// Reads the trailer and both tables and checks the total digest.
fn read_footer(source: &Source<'_>, len: u64, header: &[u8]) -> Result<(Trailer, Vec<u8>), Error> {
    let corrupt = |detail: &str| source.corrupt(FOOTER, detail);
    let trailer_at = len.checked_sub(TRAILER_LEN as u64).filter(|&at| at >= DATA_START);
    let trailer_at = trailer_at.ok_or_else(|| corrupt("the file is truncated: it ends after its header"))?;
    let mut raw = [0; TRAILER_LEN];
    source.read(FOOTER, trailer_at, &mut raw)?;
    let (trailer, stated) = Trailer::decode(&raw).map_err(corrupt)?;
    if trailer.file_len != len {
        return Err(corrupt("the file does not have the length that it states"));
    }
    // From here on every length is bounded by that of the file, and by the limits of the format.
    if trailer.data_len > MAX_DATA || trailer.data_len > trailer_at - DATA_START {
        return Err(corrupt("the data area does not fit into the file"));
    }
    if trailer.block_size != BLOCK_SIZE as u32 || trailer.block_count != Trailer::blocks_of(trailer.data_len) {
        return Err(corrupt("the number of data blocks is wrong"));
    }
    if trailer.section_count == 0 || trailer.section_count > MAX_SECTIONS {
        return Err(corrupt("the number of sections is out of range"));
    }
    let footer_len = trailer
        .footer_len()
        .filter(|&footer| footer == stated && footer <= len - DATA_START - trailer.data_len);
    let footer_len = footer_len.ok_or_else(|| corrupt("its length is wrong"))?;
    let mut tables = vec![0; footer_len as usize - TRAILER_LEN];
    source.read(FOOTER, len - footer_len, &mut tables)?;
    if digest(header, &tables, &trailer) != trailer.digest {
        return Err(corrupt("wrong checksum"));
    }
    Ok((trailer, tables))
}

fn read_section_table(path: &Path, entries: &[u8], minor: u16) -> Result<Vec<SectionInfo>, Error> {
    let corrupt = |detail: String| Error::corrupt(path, FOOTER, detail);
    let newer = minor > MINOR;
    let mut sections: Vec<SectionInfo> = Vec::with_capacity(entries.len() / ENTRY_LEN);
    for raw in entries.chunks_exact(ENTRY_LEN) {
        let section = SectionInfo::decode(raw).ok_or_else(|| corrupt("a section without a proper name".to_owned()))?;
        let name = &section.name;
        if sections.iter().any(|other| other.name == *name) {
            return Err(corrupt(format!("two sections named {name:?}")));
        }
        let limit = match section.kind {
            SectionKind::Json => MAX_JSON,
            SectionKind::Index => MAX_RUNS * RUN_LEN as u64,
            SectionKind::Unknown(_) => u64::MAX,
        };
        if section.len > limit {
            return Err(corrupt(format!(
                "section {name:?} has {} bytes, more than {limit}",
                section.len
            )));
        }
        if let SectionKind::Unknown(kind) = section.kind {
            if !newer {
                return Err(corrupt(format!("section {name:?} is of unknown kind {kind}")));
            }
            if section.flags & SECTION_MUST_KNOW != 0 {
                return Err(Error::Feature {
                    path: path.to_path_buf(),
                    section: named(name),
                    feature: format!("kind {kind}"),
                });
            }
        }
        if !newer && section.flags != 0 {
            return Err(corrupt(format!("section {name:?} has unknown flags")));
        }
        sections.push(section);
    }
    Ok(sections)
}

/// Checks that the sections fill the file from the data area to the footer, with nothing but zeros between them, and each one's checksum.
fn check_sections(source: &Source<'_>, trailer: &Trailer, sections: &[SectionInfo]) -> Result<(), Error> {
    let footer_at = trailer.file_len - trailer.footer_len().unwrap_or(0);
    let mut end = DATA_START + trailer.data_len;
    for section in sections {
        let begin = skip_padding(source, end, footer_at)?;
        let section_end = begin
            .checked_add(section.len)
            .filter(|&end| section.offset == begin && end <= footer_at);
        end = section_end
            .ok_or_else(|| source.corrupt(FOOTER, format!("section {:?} is not where it must be", section.name)))?;
        let mut sum = Rolling::new();
        let part = named(&section.name);
        source.stream(&part, begin, section.len, |piece| {
            sum.update(piece);
            Ok(())
        })?;
        if sum.digest() != section.checksum {
            return Err(source.corrupt(part, "wrong checksum"));
        }
    }
    if skip_padding(source, end, footer_at)? != footer_at {
        return Err(source.corrupt(FOOTER, "bytes that belong to no section"));
    }
    Ok(())
}

/// The next aligned offset, after seeing that the bytes up to there are zero.
fn skip_padding(source: &Source<'_>, end: u64, limit: u64) -> Result<u64, Error> {
    let next = align_up(end, ALIGN);
    if next > limit {
        return Err(source.corrupt(FOOTER, "the sections do not fit into the file"));
    }
    let mut padding = [0; ALIGN as usize];
    let padding = &mut padding[..(next - end) as usize];
    source.read("padding", end, padding)?;
    if padding.iter().any(|&byte| byte != 0) {
        return Err(source.corrupt("padding", format!("not zero at offset {end}")));
    }
    Ok(next)
}
