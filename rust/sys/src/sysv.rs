//! System V IPC: objects in the IPC namespace of the calling thread (sysvipc(7)).

use std::fs;
use std::os::fd::OwnedFd;

use crate::error::{Error, Result, check};
use crate::fd;

/// The three kinds of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Shared memory.
    Shm,
    /// Semaphores.
    Sem,
    /// Message queues.
    Msg,
}

impl Kind {
    /// Its name in /proc/sysvipc.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Shm => "shm",
            Kind::Sem => "sem",
            Kind::Msg => "msg",
        }
    }
}

/// Who owns an object, in the ids of the calling process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// Its key; 0 for one that none leads to.
    pub key: i32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// The user that made it.
    pub creator_uid: u32,
    /// The group of the user that made it.
    pub creator_gid: u32,
    /// Permissions and flags.
    pub mode: u32,
}

/// What shmctl(2) IPC_STAT tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Key and owner.
    pub owner: Owner,
    /// Size in bytes.
    pub size: u64,
    /// How many mappings there are.
    pub attached: u64,
}

/// What semctl(2) tells of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Key and owner.
    pub owner: Owner,
    /// The value of each semaphore.
    pub values: Vec<u16>,
    /// Whether it was ever used by semop(2).
    pub was_used: bool,
}

/// What msgctl(2) IPC_STAT tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Key and owner.
    pub owner: Owner,
    /// How many bytes it may hold.
    pub max_bytes: u64,
    /// How many bytes it holds.
    pub bytes: u64,
    /// How many messages it holds.
    pub messages: u64,
}

/// Type and text.
pub type Message = (i64, Vec<u8>);

/// The ids of all objects of a kind; none where the kernel does not have them.
pub fn list(kind: Kind) -> Result<Vec<i32>> {
    let path = format!("/proc/sysvipc/{}", kind.name());
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("read", path, &e)),
    };
    ids(&text).ok_or_else(|| Error::Parse {
        file: path,
        text: text.lines().nth(1).unwrap_or_default().into(),
    })
}

/// The second word of each line after the heading.
fn ids(text: &str) -> Option<Vec<i32>> {
    let id = |line: &str| line.split_ascii_whitespace().nth(1)?.parse().ok();
    text.lines().skip(1).map(id).collect()
}

/// The next object of a kind gets this id (CONFIG_CHECKPOINT_RESTORE).
pub fn ask_for_id(kind: Kind, id: i32) -> Result<()> {
    let path = format!("/proc/sys/kernel/{}_next_id", kind.name());
    fs::write(&path, id.to_string()).map_err(|e| Error::io("write", path, &e))
}

/// Lets the calling thread, which must end soon, make objects as if another user had made them; its capabilities stay.
pub fn act_as(uid: u32, gid: u32) -> Result<()> {
    const SECBIT_NO_SETUID_FIXUP: u64 = 1 << 2;
    let same = u64::from(u32::MAX);
    // SAFETY: plain numbers; raw calls, so that they affect only this thread.
    unsafe {
        let ret = libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0);
        check(ret.into(), "PR_SET_SECUREBITS", "")?;
        let ret = libc::syscall(libc::SYS_setresgid, same, u64::from(gid), same);
        check(ret, "setresgid", gid)?;
        let ret = libc::syscall(libc::SYS_setresuid, same, u64::from(uid), same);
        check(ret, "setresuid", uid).map(drop)
    }
}

fn owner_of(perm: &libc::ipc_perm) -> Owner {
    Owner {
        key: perm.__key,
        uid: perm.uid,
        gid: perm.gid,
        creator_uid: perm.cuid,
        creator_gid: perm.cgid,
        mode: perm.mode.into(),
    }
}

fn set_perm(perm: &mut libc::ipc_perm, owner: &Owner) {
    perm.uid = owner.uid;
    perm.gid = owner.gid;
    perm.mode = (owner.mode & 0o777) as libc::c_ushort;
}

// ---- shared memory

fn shm_stat(id: i32) -> Result<libc::shmid_ds> {
    // SAFETY: a struct of plain integers, for which zeroes are valid.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: ds is room for the result.
    let ret = unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut ds) };
    check(ret.into(), "shmctl", id)?;
    Ok(ds)
}

/// What there is to know of a segment.
pub fn segment(id: i32) -> Result<Segment> {
    let ds = shm_stat(id)?;
    Ok(Segment {
        owner: owner_of(&ds.shm_perm),
        size: ds.shm_segsz as u64,
        attached: ds.shm_nattch,
    })
}

/// Makes a segment; `flags` are those of shmget(2) beside its permissions.
pub fn make_segment(owner: &Owner, size: u64, flags: i32) -> Result<i32> {
    let flags = flags | libc::IPC_CREAT | libc::IPC_EXCL | (owner.mode & 0o777) as i32;
    // SAFETY: plain numbers.
    let id = unsafe { libc::shmget(owner.key, size as usize, flags) };
    check(id.into(), "shmget", format!("{:#x}", owner.key)).map(|id| id as i32)
}

/// Gives a segment its owner and permissions.
pub fn own_segment(id: i32, owner: &Owner) -> Result<()> {
    let mut ds = shm_stat(id)?;
    set_perm(&mut ds.shm_perm, owner);
    // SAFETY: ds is a valid struct.
    let ret = unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut ds) };
    check(ret.into(), "shmctl", id).map(drop)
}

fn shm_do(id: i32, command: i32) -> Result<()> {
    // SAFETY: these commands take no argument.
    let ret = unsafe { libc::shmctl(id, command, std::ptr::null_mut()) };
    check(ret.into(), "shmctl", id).map(drop)
}

/// Removes a segment, as soon as nobody has it attached.
pub fn remove_segment(id: i32) -> Result<()> {
    shm_do(id, libc::IPC_RMID)
}

/// Keeps a segment in memory.
pub fn lock_segment(id: i32) -> Result<()> {
    const SHM_LOCK: i32 = 11;
    shm_do(id, SHM_LOCK)
}

/// A segment that this process has attached, until it is dropped.
#[derive(Debug)]
pub struct Attached {
    address: u64,
    len: u64,
}

impl Attached {
    /// Attaches a segment of `size` bytes: it is neither read nor written through this.
    pub fn to(id: i32, size: u64, flags: i32) -> Result<Attached> {
        // SAFETY: a new mapping at an address of the kernel's choice, which nothing here dereferences.
        let address = unsafe { libc::shmat(id, std::ptr::null(), flags) };
        if address as isize == -1 {
            return Err(Error::last("shmat", id));
        }
        Ok(Attached {
            address: address as u64,
            len: size.next_multiple_of(crate::PAGE_SIZE),
        })
    }

    /// The file behind it, which stays when this is dropped and does not count as attached.
    pub fn file(&self, flags: i32) -> Result<OwnedFd> {
        let (start, end) = (self.address, self.address + self.len);
        fd::open(&format!("/proc/self/map_files/{start:x}-{end:x}"), flags)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: what shmat returned and nobody uses.
        unsafe { libc::shmdt(self.address as *const _) };
    }
}

// ---- semaphores

/// The argument of semctl(2).
#[repr(C)]
union SemArg {
    value: i32,
    ds: *mut libc::semid_ds,
    array: *mut u16,
}

fn sem_stat(id: i32) -> Result<libc::semid_ds> {
    // SAFETY: a struct of plain integers, for which zeroes are valid.
    let mut ds: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: ds is room for the result.
    let ret = unsafe { libc::semctl(id, 0, libc::IPC_STAT, SemArg { ds: &raw mut ds }) };
    check(ret.into(), "semctl", id)?;
    Ok(ds)
}

/// What there is to know of a set of semaphores.
pub fn set(id: i32) -> Result<Set> {
    const GETALL: i32 = 13;
    let ds = sem_stat(id)?;
    let mut values = vec![0u16; ds.sem_nsems as usize];
    let array = values.as_mut_ptr();
    // SAFETY: room for as many as there are: the number never changes.
    let ret = unsafe { libc::semctl(id, 0, GETALL, SemArg { array }) };
    check(ret.into(), "semctl", id)?;
    Ok(Set {
        owner: owner_of(&ds.sem_perm),
        values,
        was_used: ds.sem_otime != 0,
    })
}

/// The process that last changed a semaphore, as the calling process numbers it; 0 for one that it cannot see.
pub fn last_pid(id: i32, number: usize) -> Result<i32> {
    const GETPID: i32 = 11;
    // SAFETY: this command takes no argument.
    let pid = unsafe { libc::semctl(id, number as i32, GETPID, SemArg { value: 0 }) };
    check(pid.into(), "semctl", id).map(|pid| pid as i32)
}

/// Makes a set of `count` semaphores that are all 0.
pub fn make_set(owner: &Owner, count: usize) -> Result<i32> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (owner.mode & 0o777) as i32;
    // SAFETY: plain numbers.
    let id = unsafe { libc::semget(owner.key, count as i32, flags) };
    check(id.into(), "semget", format!("{:#x}", owner.key)).map(|id| id as i32)
}

/// Gives a set its owner and permissions.
pub fn own_set(id: i32, owner: &Owner) -> Result<()> {
    let mut ds = sem_stat(id)?;
    set_perm(&mut ds.sem_perm, owner);
    // SAFETY: ds is a valid struct.
    let ret = unsafe { libc::semctl(id, 0, libc::IPC_SET, SemArg { ds: &raw mut ds }) };
    check(ret.into(), "semctl", id).map(drop)
}

/// Sets one semaphore, which does not count as use by semop(2).
pub fn set_value(id: i32, number: usize, value: u16) -> Result<()> {
    const SETVAL: i32 = 16;
    let value = i32::from(value);
    // SAFETY: plain numbers.
    let ret = unsafe { libc::semctl(id, number as i32, SETVAL, SemArg { value }) };
    check(ret.into(), "semctl", id).map(drop)
}

/// Changes semaphores: (number, by how much); never waits.
pub fn operate(id: i32, operations: &[(u16, i16)]) -> Result<()> {
    let mut operations: Vec<libc::sembuf> = operations
        .iter()
        .map(|&(sem_num, sem_op)| libc::sembuf {
            sem_num,
            sem_op,
            sem_flg: libc::IPC_NOWAIT as i16,
        })
        .collect();
    // SAFETY: pointer and length of one vector.
    let ret = unsafe { libc::semop(id, operations.as_mut_ptr(), operations.len()) };
    check(ret.into(), "semop", id).map(drop)
}

// ---- message queues

fn msg_stat(id: i32) -> Result<libc::msqid_ds> {
    // SAFETY: a struct of plain integers, for which zeroes are valid.
    let mut ds: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: ds is room for the result.
    let ret = unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut ds) };
    check(ret.into(), "msgctl", id)?;
    Ok(ds)
}

/// What there is to know of a message queue.
pub fn queue(id: i32) -> Result<Queue> {
    let ds = msg_stat(id)?;
    Ok(Queue {
        owner: owner_of(&ds.msg_perm),
        max_bytes: ds.msg_qbytes,
        bytes: ds.__msg_cbytes,
        messages: ds.msg_qnum,
    })
}

/// A copy of the message at `index` of at most `room` bytes, which stays where it is (CONFIG_CHECKPOINT_RESTORE).
fn message(id: i32, index: u64, room: usize) -> Result<Message> {
    const MSG_COPY: i32 = 0o40000;
    let mut buffer = vec![0u8; 8 + room];
    // SAFETY: the buffer has 8 bytes for the type and `room` for the text.
    let got = unsafe {
        libc::msgrcv(
            id,
            buffer.as_mut_ptr().cast(),
            room,
            index as i64,
            MSG_COPY | libc::IPC_NOWAIT,
        )
    };
    let got = check(got as i64, "msgrcv", id)? as usize;
    let mut kind = [0; 8];
    kind.copy_from_slice(&buffer[..8]);
    Ok((i64::from_ne_bytes(kind), buffer[8..8 + got].to_vec()))
}

/// Copies of all messages, in order; `None` where the kernel does not give any (do_msgrcv in ipc/msg.c, ENOSYS).
pub fn messages(id: i32, queue: &Queue) -> Result<Option<Vec<Message>>> {
    let copies: Result<Vec<Message>> = (0..queue.messages)
        .map(|at| message(id, at, queue.bytes as usize))
        .collect();
    match copies {
        Err(e) if e.errno() == Some(nix::errno::Errno::ENOSYS) => Ok(None),
        other => other.map(Some),
    }
}

/// Makes a message queue.
pub fn make_queue(owner: &Owner) -> Result<i32> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (owner.mode & 0o777) as i32;
    // SAFETY: plain numbers.
    let id = unsafe { libc::msgget(owner.key, flags) };
    check(id.into(), "msgget", format!("{:#x}", owner.key)).map(|id| id as i32)
}

/// Gives a message queue its owner, permissions and size.
pub fn own_queue(id: i32, owner: &Owner, max_bytes: u64) -> Result<()> {
    let mut ds = msg_stat(id)?;
    set_perm(&mut ds.msg_perm, owner);
    ds.msg_qbytes = max_bytes;
    // SAFETY: ds is a valid struct.
    let ret = unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut ds) };
    check(ret.into(), "msgctl", id).map(drop)
}

/// Puts a message at the end of a queue; never waits.
pub fn send(id: i32, kind: i64, text: &[u8]) -> Result<()> {
    let mut buffer = kind.to_ne_bytes().to_vec();
    buffer.extend_from_slice(text);
    // SAFETY: 8 bytes of type, and the text whose length is given.
    let ret = unsafe { libc::msgsnd(id, buffer.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) };
    check(ret.into(), "msgsnd", id).map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_the_second_words() {
        let text = "       key      semid perms      nsems   uid\n -16777215          3   600          1     0\n         0      32771 600 1 0\n";
        assert_eq!(ids(text).unwrap(), [3, 32771]);
        assert_eq!(ids("       key      shmid perms\n").unwrap(), [0i32; 0]);
        assert_eq!(ids("key shmid\n1 x\n"), None);
    }
}
