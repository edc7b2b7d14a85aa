//! One file of a chain: opened, and all of it but its page index and its data blocks verified.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use nix::errno::Errno;
use nix::libc::O_NONBLOCK;

use crate::checksum::{self, Rolling};
use crate::codec::Codec;
use crate::error::Error;
use crate::frames::{Frame, Frames};
use crate::header::HeaderInfo;
use crate::layout::{
    ALIGN, BLOCK_SIZE, DATA_START, ENTRY_LEN, FILE_NAME, FRAME_LEN, FRAMES_NAME, HEADER_LEN, MAX_DATA, MAX_FRAMES,
    MAX_JSON, MAX_RUNS, MAX_SECTIONS, MINOR, RUN_LEN, SECTION_MUST_KNOW, SectionInfo, SectionKind, TRAILER_LEN,
    Trailer, align_up, u64_at,
};
use crate::write::digest;

const CHUNK: usize = 1 << 20;
const VERIFY_THREADS: usize = 4;
/// Unpacked blocks that are kept: readers of small pieces come back to the same block.
const KEPT: usize = 4;
const FOOTER: &str = "footer";

/// One file. Offsets are those of its data area as it is when unpacked: in a file that is not compressed, those of the file.
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
    frames: Option<Frames>,
    /// Blocks that were unpacked last, the latest at the end.
    kept: Mutex<Vec<(u64, Arc<Vec<u8>>)>>,
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
        let frames = read_frames(&source, &info, &trailer, &sections)?;
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
            frames,
            kept: Mutex::new(Vec::new()),
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

    /// Length of the data area when it is unpacked.
    pub(crate) fn data_len(&self) -> u64 {
        self.frames.as_ref().map_or(self.trailer.data_len, Frames::data_len)
    }

    /// Where the unpacked data area ends.
    pub(crate) fn data_end(&self) -> u64 {
        DATA_START + self.data_len()
    }

    pub(crate) fn codec(&self) -> Option<Codec> {
        self.frames.as_ref().map(|frames| frames.codec)
    }

    pub(crate) fn is_compressed(&self) -> bool {
        self.frames.is_some()
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

    /// Reads data; without a look at checksums where it is stored as it is.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        self.check_range(offset, buf.len() as u64)?;
        if !self.is_compressed() {
            return self.source().read("data", offset, buf);
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (begin, block) = self.unpacked(at)?;
            let from = (at - begin) as usize;
            let len = (block.len() - from).min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&block[from..from + len]);
            done += len;
        }
        Ok(())
    }

    /// Reads and checks the block that holds `offset`; returns where it begins.
    pub(crate) fn read_block(&self, offset: u64, buffer: &mut Vec<u8>) -> Result<u64, Error> {
        let block = self.block_of(offset)?;
        match &self.frames {
            Some(frames) => self.load_frame(frames, block, buffer, &mut Vec::new())?,
            None => self.load_block(block, buffer)?,
        }
        Ok(DATA_START + block * BLOCK_SIZE as u64)
    }

    /// As [`Link::read_block`], from the blocks that are kept, where the new one then is too.
    pub(crate) fn unpacked(&self, offset: u64) -> Result<(u64, Arc<Vec<u8>>), Error> {
        let begin = DATA_START + self.block_of(offset)? * BLOCK_SIZE as u64;
        let found = self.kept.lock().ok().and_then(|kept| {
            let known = kept.iter().find(|(at, _)| *at == begin);
            known.map(|(_, block)| Arc::clone(block))
        });
        if let Some(block) = found {
            return Ok((begin, block));
        }
        let mut buffer = Vec::new();
        self.read_block(offset, &mut buffer)?;
        let block = Arc::new(buffer);
        if let Ok(mut kept) = self.kept.lock() {
            if kept.len() == KEPT {
                kept.remove(0);
            }
            kept.push((begin, Arc::clone(&block)));
        }
        Ok((begin, block))
    }

    /// Bytes of the data area, as it is stored.
    pub(crate) fn stored_len(&self) -> u64 {
        self.trailer.data_len
    }

    /// Reads every byte of the data area, as it is stored, and compares its checksums. `checked` is told of the bytes of each block.
    pub(crate) fn verify_stored(&self, checked: &(impl Fn(u64) + Sync)) -> Result<(), Error> {
        self.all(self.blocks.len(), |block, buffer, _| {
            self.load_block(block, buffer)?;
            checked(buffer.len() as u64);
            Ok(())
        })
    }

    /// Also unpacks all of it.
    pub(crate) fn verify(&self) -> Result<(), Error> {
        self.verify_stored(&|_| ())?;
        self.frames.as_ref().map_or(Ok(()), |frames| {
            self.all(frames.len(), |number, buffer, stored| {
                self.load_frame(frames, number, buffer, stored)
            })
        })
    }

    /// Does `load` for every number below `count`, with several threads, each with two buffers. Of several failures the one with the
    /// lowest number is returned.
    fn all(
        &self,
        count: usize,
        load: impl Fn(u64, &mut Vec<u8>, &mut Vec<u8>) -> Result<(), Error> + Sync,
    ) -> Result<(), Error> {
        let available = thread::available_parallelism().map_or(1, |count| count.get());
        // A thread for less than 8 MiB costs more than it saves.
        let threads = available.min(VERIFY_THREADS).min(count / 8).max(1);
        let next = AtomicU64::new(0);
        // Numbers are handed out in order, so the first failure of each worker is enough to find the first of all.
        let work = || {
            let (mut buffer, mut stored) = (Vec::new(), Vec::new());
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count as u64 {
                    return Ok(());
                }
                if let Err(failed) = load(number, &mut buffer, &mut stored) {
                    // Later ones need no look, earlier ones are already in the hands of others.
                    next.fetch_max(count as u64, Ordering::Relaxed);
                    return Err((number, failed));
                }
            }
        };
        let mut failures: Vec<(u64, Error)> = thread::scope(|scope| {
            let workers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            let others = workers.into_iter().map(|worker| worker.join());
            // A worker has nothing that panics; should it ever, its blocks count as not verified.
            let joined =
                others.map(|result| result.unwrap_or_else(|_| Err((0, self.corrupt("data", "verifying failed")))));
            joined.chain([own]).filter_map(Result::err).collect()
        });
        failures.sort_by_key(|(number, _)| *number);
        failures.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    fn block_of(&self, offset: u64) -> Result<u64, Error> {
        let known = offset.checked_sub(DATA_START).filter(|&at| at < self.data_len());
        let at = known.ok_or_else(|| self.corrupt("data", format!("no data at offset {offset}")))?;
        Ok(at / BLOCK_SIZE as u64)
    }

    /// Reads a block of the file.
    fn load_block(&self, block: u64, buffer: &mut Vec<u8>) -> Result<(), Error> {
        let begin = block * BLOCK_SIZE as u64;
        let len = (self.trailer.data_len - begin).min(BLOCK_SIZE as u64) as usize;
        buffer.resize(len, 0);
        let offset = DATA_START + begin;
        self.source().read("data", offset, buffer)?;
        if checksum::of(buffer) != self.blocks[block as usize] {
            return Err(self.corrupt("data", format!("wrong checksum of the {len} bytes at offset {offset}")));
        }
        Ok(())
    }

    fn load_frame(
        &self,
        frames: &Frames,
        number: u64,
        buffer: &mut Vec<u8>,
        stored: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let Some(&Frame {
            offset, stored: len, ..
        }) = frames.get(number)
        else {
            return Err(self.corrupt("data", format!("no frame {number}")));
        };
        stored.resize(len as usize, 0);
        self.source().read("data", offset, stored)?;
        let whole = frames
            .get(number)
            .is_some_and(|frame| frame.unpack(frames.codec, stored, buffer));
        if !whole {
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
            SectionKind::Frames => MAX_FRAMES * FRAME_LEN as u64,
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

/// Reads the frame table of a file whose header says that it is compressed; no other has one.
fn read_frames(
    source: &Source<'_>,
    info: &HeaderInfo,
    trailer: &Trailer,
    sections: &[SectionInfo],
) -> Result<Option<Frames>, Error> {
    let corrupt = |detail: String| source.corrupt(named(FRAMES_NAME), detail);
    let mut tables = sections.iter().filter(|section| section.kind == SectionKind::Frames);
    let (codec, table) = match (Codec::of(&info.requires), tables.next(), tables.next()) {
        (None, None, None) => return Ok(None),
        (Some(codec), Some(table), None) if table.name == FRAMES_NAME => (codec, table),
        _ => {
            return Err(corrupt(
                "there must be one in a compressed image, and none in another".to_owned(),
            ));
        }
    };
    if table.len % FRAME_LEN as u64 != 0 {
        return Err(corrupt("its length is not a whole number of records".to_owned()));
    }
    let mut frames = Frames::new(codec);
    source.stream(FRAMES_NAME, table.offset, table.len, |piece| {
        piece.chunks_exact(FRAME_LEN).try_for_each(|record| {
            let number = frames.len();
            frames
                .push(record)
                .map_err(|detail| corrupt(format!("record {number}: {detail}")))
        })
    })?;
    if frames.end() != DATA_START + trailer.data_len {
        return Err(corrupt("the frames do not fill the data area".to_owned()));
    }
    Ok(Some(frames))
}
