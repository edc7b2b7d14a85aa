//! Readers and pure parsers of /proc (proc(5)). A parser takes text and returns a value; it never touches the system.

use std::fs;
use std::io::Read;

use crate::Pid;
use crate::error::{Error, Result};

fn read(path: &str) -> Result<String> {
    // The files of /proc say that they are empty: without room from the start they would be read in pieces of 32, 32, 64... bytes.
    let mut bytes = Vec::with_capacity(16 << 10);
    fs::File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .map_err(|e| Error::io("read", path, &e))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn bad(file: &str, text: &str) -> Error {
    Error::Parse {
        file: file.into(),
        text: text.chars().take(120).collect(),
    }
}

/// The fields of /proc/PID/stat that describe a task and its address space.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Stat {
    pub comm: String,
    pub state: char,
    pub ppid: Pid,
    pub pgrp: Pid,
    pub session: Pid,
    pub tty_nr: i64,
    pub tpgid: Pid,
    /// Clock ticks after boot; with the pid it names a process for ever.
    pub start_time: u64,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub exit_signal: i32,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// The status that wait(2) would give; for zombies.
    pub exit_code: i32,
}

/// Parses /proc/PID/stat. The command name may hold spaces and parentheses.
pub fn parse_stat(text: &str) -> Option<Stat> {
    let open = text.find('(')?;
    let close = text.rfind(')')?;
    let fields: Vec<&str> = text.get(close + 2..)?.split_ascii_whitespace().collect();
    // Field numbers of proc(5) start at 1; the first one after the name is number 3.
    let at = |n: usize| fields.get(n - 3).copied();
    let num = |n: usize| at(n)?.parse::<i64>().ok();
    let addr = |n: usize| at(n)?.parse::<u64>().ok();
    let id = |n: usize| at(n)?.parse::<Pid>().ok();
    Some(Stat {
        comm: text.get(open + 1..close)?.into(),
        state: at(3)?.chars().next()?,
        ppid: id(4)?,
        pgrp: id(5)?,
        session: id(6)?,
        tty_nr: num(7)?,
        tpgid: id(8)?,
        start_time: addr(22)?,
        start_code: addr(26)?,
        end_code: addr(27)?,
        start_stack: addr(28)?,
        exit_signal: id(38)?,
        start_data: addr(45)?,
        end_data: addr(46)?,
        start_brk: addr(47)?,
        arg_start: addr(48)?,
        arg_end: addr(49)?,
        env_start: addr(50)?,
        env_end: addr(51)?,
        exit_code: id(52)?,
    })
}

/// /proc/PID/stat of a process or thread.
pub fn stat(pid: Pid) -> Result<Stat> {
    let path = format!("/proc/{pid}/stat");
    let text = read(&path)?;
    parse_stat(&text).ok_or_else(|| bad(&path, &text))
}

/// The fields of /proc/PID/status that are state. Ids are as our user and pid namespace see them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Status {
    pub umask: u32,
    /// Real, effective, saved and file system user id.
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    /// The task's id in each pid namespace, outermost first.
    pub ns_pids: Vec<Pid>,
    /// The same of its process.
    pub ns_tgids: Vec<Pid>,
    pub ns_pgids: Vec<Pid>,
    pub ns_sids: Vec<Pid>,
    pub tgid: Pid,
    pub tracer: Pid,
    pub threads: u32,
    pub core_dumping: bool,
    /// Memory that is locked (mlock(2)), in KiB.
    pub locked_kib: u64,
    pub thp_enabled: bool,
    pub sig_pending: u64,
    pub shared_pending: u64,
    pub sig_blocked: u64,
    pub sig_ignored: u64,
    pub sig_caught: u64,
    pub cap_inheritable: u64,
    pub cap_permitted: u64,
    pub cap_effective: u64,
    pub cap_bounding: u64,
    pub cap_ambient: u64,
    pub no_new_privs: bool,
    /// 0 none, 1 strict, 2 filters.
    pub seccomp: u32,
    pub seccomp_filters: u32,
}

/// Parses /proc/PID/status. Fields that an older kernel lacks keep their default.
pub fn parse_status(text: &str) -> Option<Status> {
    let mut s = Status {
        thp_enabled: true,
        ..Status::default()
    };
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        let hex = || u64::from_str_radix(value, 16).ok();
        let ids = || {
            value
                .split_ascii_whitespace()
                .map(str::parse)
                .collect::<std::result::Result<Vec<_>, _>>()
                .ok()
        };
        let four = || {
            <[u32; 4]>::try_from(
                value
                    .split_ascii_whitespace()
                    .map_while(|v| v.parse().ok())
                    .collect::<Vec<u32>>(),
            )
            .ok()
        };
        match key {
            "Umask" => s.umask = u32::from_str_radix(value, 8).ok()?,
            "Uid" => s.uids = four()?,
            "Gid" => s.gids = four()?,
            "Groups" => s.groups = value.split_ascii_whitespace().map_while(|v| v.parse().ok()).collect(),
            "NSpid" => s.ns_pids = ids()?,
            "NStgid" => s.ns_tgids = ids()?,
            "NSpgid" => s.ns_pgids = ids()?,
            "NSsid" => s.ns_sids = ids()?,
            "Tgid" => s.tgid = value.parse().ok()?,
            "TracerPid" => s.tracer = value.parse().ok()?,
            "Threads" => s.threads = value.parse().ok()?,
            "CoreDumping" => s.core_dumping = value == "1",
            "VmLck" => s.locked_kib = value.split(' ').next()?.parse().ok()?,
            "THP_enabled" => s.thp_enabled = value == "1",
            "SigPnd" => s.sig_pending = hex()?,
            "ShdPnd" => s.shared_pending = hex()?,
            "SigBlk" => s.sig_blocked = hex()?,
            "SigIgn" => s.sig_ignored = hex()?,
            "SigCgt" => s.sig_caught = hex()?,
            "CapInh" => s.cap_inheritable = hex()?,
            "CapPrm" => s.cap_permitted = hex()?,
            "CapEff" => s.cap_effective = hex()?,
            "CapBnd" => s.cap_bounding = hex()?,
            "CapAmb" => s.cap_ambient = hex()?,
            "NoNewPrivs" => s.no_new_privs = value == "1",
            "Seccomp" => s.seccomp = value.parse().ok()?,
            "Seccomp_filters" => s.seccomp_filters = value.parse().ok()?,
            _ => {}
        }
    }
    Some(s)
}

/// /proc/PID/status of a process or thread.
pub fn status(pid: Pid) -> Result<Status> {
    let path = format!("/proc/{pid}/status");
    let text = read(&path)?;
    parse_status(&text).ok_or_else(|| bad(&path, &text))
}

/// Makes a process the first that the kernel kills when memory runs out, of the machine or of a control group (proc(5),
/// oom_score_adj). Raising this needs no capability.
pub fn give_up_first(pid: Pid) -> Result<()> {
    let path = format!("/proc/{pid}/oom_score_adj");
    fs::write(&path, "1000").map_err(|e| Error::io("write", &path, &e))
}

/// One mapping of /proc/PID/smaps (or maps, then without flags).
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Vma {
    pub start: u64,
    pub end: u64,
    pub read: bool,
    pub write: bool,
    pub exec: bool,
    pub shared: bool,
    pub offset: u64,
    pub dev: (u32, u32),
    pub inode: u64,
    /// As the kernel prints it, escapes and " (deleted)" included.
    pub name: String,
    /// The two-letter VmFlags, empty when read from maps.
    pub flags: Vec<[u8; 2]>,
    /// The protection key (pkeys(7)), 0 when read from maps or where there are none.
    pub key: u32,
}

impl Vma {
    /// True when VmFlags holds this two-letter flag.
    pub fn has(&self, flag: &[u8; 2]) -> bool {
        self.flags.contains(flag)
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Never true for what the kernel lists.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }

    /// The PROT_* bits.
    pub fn prot(&self) -> i32 {
        let bit = |on, bit| if on { bit } else { 0 };
        bit(self.read, libc::PROT_READ) | bit(self.write, libc::PROT_WRITE) | bit(self.exec, libc::PROT_EXEC)
    }
}

fn parse_vma_line(line: &str) -> Option<Vma> {
    let mut rest = line;
    let mut word = || {
        let (w, r) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = r;
        Some(w)
    };
    let (start, end) = word()?.split_once('-')?;
    let perms = word()?.as_bytes();
    let offset = word()?;
    let (major, minor) = word()?.split_once(':')?;
    let inode = word()?;
    let hex = |s| u64::from_str_radix(s, 16).ok();
    Some(Vma {
        start: hex(start)?,
        end: hex(end)?,
        read: *perms.first()? == b'r',
        write: *perms.get(1)? == b'w',
        exec: *perms.get(2)? == b'x',
        shared: *perms.get(3)? == b's',
        offset: hex(offset)?,
        dev: (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        inode: inode.parse().ok()?,
        name: rest.trim_start().into(),
        flags: Vec::new(),
        key: 0,
    })
}

/// Parses /proc/PID/maps or smaps.
pub fn parse_maps(text: &str) -> Option<Vec<Vma>> {
    let mut all: Vec<Vma> = Vec::new();
    for line in text.lines() {
        let first = line.bytes().next()?;
        if first.is_ascii_digit() || (b'a'..=b'f').contains(&first) {
            all.push(parse_vma_line(line)?);
        } else if let Some(key) = line.strip_prefix("ProtectionKey:") {
            all.last_mut()?.key = key.trim().parse().ok()?;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let vma = all.last_mut()?;
            vma.flags = flags
                .split_ascii_whitespace()
                .filter_map(|f| f.as_bytes().try_into().ok())
                .collect();
        }
    }
    Some(all)
}

/// The mappings of a process with their flags. Costs a walk of its page tables.
pub fn smaps(pid: Pid) -> Result<Vec<Vma>> {
    let path = format!("/proc/{pid}/smaps");
    let text = read(&path)?;
    parse_maps(&text).ok_or_else(|| bad(&path, &text))
}

/// How much of its memory is there, in bytes (statm of proc(5)).
pub fn resident(pid: Pid) -> Result<u64> {
    let path = format!("/proc/{pid}/statm");
    let text = read(&path)?;
    let pages = text.split_ascii_whitespace().nth(1).and_then(|p| p.parse::<u64>().ok());
    pages.map(|p| p * crate::PAGE_SIZE).ok_or_else(|| bad(&path, &text))
}

/// The mappings of a process without flags.
pub fn maps(pid: Pid) -> Result<Vec<Vma>> {
    let path = format!("/proc/{pid}/maps");
    let text = read(&path)?;
    parse_maps(&text).ok_or_else(|| bad(&path, &text))
}

fn numbers_in(dir: &str) -> Result<Vec<i32>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("open", dir, &e))? {
        let entry = entry.map_err(|e| Error::io("getdents", dir, &e))?;
        if let Some(n) = entry.file_name().to_str().and_then(|s| s.parse().ok()) {
            all.push(n);
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// The thread ids of a process.
pub fn threads(pid: Pid) -> Result<Vec<Pid>> {
    numbers_in(&format!("/proc/{pid}/task"))
}

/// The open descriptor numbers of a process.
pub fn fds(pid: Pid) -> Result<Vec<i32>> {
    numbers_in(&format!("/proc/{pid}/fd"))
}

/// The children of all threads of a process.
pub fn children(pid: Pid) -> Result<Vec<Pid>> {
    let mut all = Vec::new();
    for tid in threads(pid)? {
        match read(&format!("/proc/{pid}/task/{tid}/children")) {
            Ok(text) => all.extend(text.split_ascii_whitespace().filter_map(|p| p.parse::<Pid>().ok())),
            Err(e) if e.errno() == Some(nix::errno::Errno::ENOENT) => {}
            Err(e) if e.errno() == Some(nix::errno::Errno::ESRCH) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

/// /proc/PID/fdinfo/FD: what all kinds have, and the lines that only one kind has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct FdInfo {
    pub pos: i64,
    /// O_* of the description, with O_CLOEXEC of the descriptor mixed in.
    pub flags: i32,
    pub mnt_id: u64,
    pub ino: u64,
    pub lines: Vec<String>,
}

impl FdInfo {
    /// The value of the first line `key: value`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.lines
            .iter()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))
            .map(str::trim)
    }
}

/// Parses an fdinfo file.
pub fn parse_fdinfo(text: &str) -> Option<FdInfo> {
    let mut info = FdInfo::default();
    for line in text.lines() {
        let (key, value) = line.split_once(':')?;
        let value = value.trim();
        match key {
            "pos" => info.pos = value.parse().ok()?,
            "flags" => info.flags = i32::from_str_radix(value, 8).ok()?,
            "mnt_id" => info.mnt_id = value.parse().ok()?,
            "ino" if info.lines.is_empty() => info.ino = value.parse().ok()?,
            _ => info.lines.push(line.into()),
        }
    }
    Some(info)
}

/// fdinfo of an open file of a process.
pub fn fdinfo(pid: Pid, fd: i32) -> Result<FdInfo> {
    let path = format!("/proc/{pid}/fdinfo/{fd}");
    let text = read(&path)?;
    parse_fdinfo(&text).ok_or_else(|| bad(&path, &text))
}

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Mount {
    pub id: u64,
    pub parent: u64,
    pub dev: (u32, u32),
    /// The directory of the file system that is the root of this mount.
    pub root: String,
    /// Where it is mounted, as seen from the process's root.
    pub point: String,
    pub fs_type: String,
    pub source: String,
    pub options: String,
    pub super_options: String,
}

fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let octal = (bytes[i] == b'\\')
            .then(|| text.get(i + 1..i + 4).and_then(|o| u8::from_str_radix(o, 8).ok()))
            .flatten();
        match octal {
            Some(b) => {
                out.push(b);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Parses /proc/PID/mountinfo.
pub fn parse_mountinfo(text: &str) -> Option<Vec<Mount>> {
    text.lines()
        .map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            let (major, minor) = left.get(2)?.split_once(':')?;
            Some(Mount {
                id: left.first()?.parse().ok()?,
                parent: left.get(1)?.parse().ok()?,
                dev: (major.parse().ok()?, minor.parse().ok()?),
                root: unescape(left.get(3)?),
                point: unescape(left.get(4)?),
                options: (*left.get(5)?).into(),
                fs_type: (*right.first()?).into(),
                source: unescape(right.get(1)?),
                super_options: (*right.get(2)?).into(),
            })
        })
        .collect()
}

/// The mounts that a process sees.
pub fn mountinfo(pid: Pid) -> Result<Vec<Mount>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = read(&path)?;
    parse_mountinfo(&text).ok_or_else(|| bad(&path, &text))
}

/// One controller line of /proc/PID/cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupEntry {
    /// Controllers of a v1 hierarchy; empty for v2.
    pub controllers: Vec<String>,
    /// Path below the hierarchy's root.
    pub path: String,
}

/// Parses /proc/PID/cgroup.
pub fn parse_cgroup(text: &str) -> Option<Vec<CgroupEntry>> {
    text.lines()
        .map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let names = parts.next()?;
            let controllers = names.split(',').filter(|n| !n.is_empty()).map(String::from).collect();
            Some(CgroupEntry {
                controllers,
                path: parts.next()?.into(),
            })
        })
        .collect()
}

/// The cgroups of a process.
pub fn cgroup(pid: Pid) -> Result<Vec<CgroupEntry>> {
    let path = format!("/proc/{pid}/cgroup");
    let text = read(&path)?;
    parse_cgroup(&text).ok_or_else(|| bad(&path, &text))
}

/// Soft and hard limits by RLIMIT_* number; `u64::MAX` means unlimited.
pub type Limits = [(u64, u64); 16];

/// Parses /proc/PID/limits, whose lines come in an order of their own.
pub fn parse_limits(text: &str) -> Option<Limits> {
    // The names that the kernel prints (fs/proc/base.c, lnames), by RLIMIT_* number.
    const NAMES: [&str; 16] = [
        "Max cpu time",
        "Max file size",
        "Max data size",
        "Max stack size",
        "Max core file size",
        "Max resident set",
        "Max processes",
        "Max open files",
        "Max locked memory",
        "Max address space",
        "Max file locks",
        "Max pending signals",
        "Max msgqueue size",
        "Max nice priority",
        "Max realtime priority",
        "Max realtime timeout",
    ];
    let mut limits = [(u64::MAX, u64::MAX); 16];
    for (slot, name) in limits.iter_mut().zip(NAMES) {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        let mut values = line.split_ascii_whitespace().map(|v| match v {
            "unlimited" => Some(u64::MAX),
            v => v.parse().ok(),
        });
        *slot = (values.next()??, values.next()??);
    }
    Some(limits)
}

/// The resource limits of a process.
pub fn limits(pid: Pid) -> Result<Limits> {
    let path = format!("/proc/{pid}/limits");
    let text = read(&path)?;
    parse_limits(&text).ok_or_else(|| bad(&path, &text))
}

/// The auxiliary vector as the kernel keeps it.
pub fn auxv(pid: Pid) -> Result<Vec<u8>> {
    let path = format!("/proc/{pid}/auxv");
    fs::read(&path).map_err(|e| Error::io("read", &path, &e))
}

/// A symbolic link of /proc, as text.
pub fn link(path: &str) -> Result<String> {
    let target = fs::read_link(path).map_err(|e| Error::io("readlink", path, &e))?;
    Ok(target.to_string_lossy().into_owned())
}

/// The inode number of a namespace of a task (`kind` as in /proc/PID/ns).
pub fn namespace(pid: Pid, kind: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/ns/{kind}");
    let text = link(&path)?;
    let number = text
        .split_once('[')
        .and_then(|(_, n)| n.trim_end_matches(']').parse().ok());
    number.ok_or_else(|| bad(&path, &text))
}

/// An id map of a user namespace: (inside, outside, count).
pub fn id_map(pid: Pid, which: &str) -> Result<Vec<(u32, u32, u32)>> {
    let path = format!("/proc/{pid}/{which}");
    let text = read(&path)?;
    text.lines()
        .map(|l| {
            let mut n = l.split_ascii_whitespace().map(|v| v.parse().ok());
            Some((n.next()??, n.next()??, n.next()??))
        })
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| bad(&path, &text))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_an_awkward_name() {
        let me = std::process::id() as Pid;
        let text = fs::read_to_string(format!("/proc/{me}/stat")).unwrap();
        let open = text.find('(').unwrap();
        let close = text.rfind(')').unwrap();
        let odd = format!("{}(a ) R 1 (b{}", &text[..open], &text[close..]);
        let s = parse_stat(&odd).unwrap();
        assert_eq!(s.comm, "a ) R 1 (b");
        assert_eq!(s.ppid, parse_stat(&text).unwrap().ppid);
    }

    #[test]
    fn own_files_parse() {
        let me = std::process::id() as Pid;
        assert!(status(me).unwrap().threads >= 1);
        let with_flags = smaps(me).unwrap();
        assert!(with_flags.iter().any(|v| v.name == "[stack]" && v.has(b"gd")));
        assert!(with_flags.iter().all(|v| v.start < v.end));
        assert!(!mountinfo(me).unwrap().is_empty());
        assert_eq!(limits(me).unwrap().len(), 16);
        assert!(cgroup(me).unwrap().iter().all(|c| c.path.starts_with('/')));
        assert!(namespace(me, "pid").unwrap() > 0);
    }

    #[test]
    fn mount_points_are_unescaped() {
        let line = "36 35 98:0 /m\\0401 /mnt\\011x rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let m = &parse_mountinfo(line).unwrap()[0];
        assert_eq!(
            (m.root.as_str(), m.point.as_str(), m.fs_type.as_str()),
            ("/m 1", "/mnt\tx", "ext3")
        );
    }

    #[test]
    fn maps_names_keep_their_spaces() {
        let v = &parse_maps("00400000-00452000 r-xs 00001000 08:02 173521      /a b (deleted)\n").unwrap()[0];
        assert_eq!(
            (v.name.as_str(), v.shared, v.offset, v.inode),
            ("/a b (deleted)", true, 0x1000, 173_521)
        );
    }
}
