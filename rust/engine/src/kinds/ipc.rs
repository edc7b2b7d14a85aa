//! The IPC namespace of a container: System V shared memory, semaphores and message queues, and their limits. POSIX
//! message queues are not carried yet, and so refused by name.
//!
//! Only a namespace that is the container's own is saved: what is in another one outlives the container.

pub mod limits;
pub mod queues;
pub mod segments;
pub mod semaphores;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_image::{BlobRef, Reader};
use torpor_sys::proc::Vma;
use torpor_sys::sysv::{self, Kind};
use torpor_sys::{Pid, namespace, proc, tree};

use super::creds::IdMaps;
use super::shared;
use crate::bounds::Bounds;
use crate::error::{About, Error, Result};

/// What is in the namespace.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Shared memory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub segments: Vec<segments::State>,
    /// Semaphores.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub semaphores: Vec<semaphores::State>,
    /// Message queues.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queues: Vec<queues::State>,
    /// Limits that are not what a new namespace has: by the name of the file under /proc/sys.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, String>,
}

/// Who owns an object, as the container numbers users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The key that leads to it; 0 for IPC_PRIVATE.
    pub key: i32,
    /// Permissions.
    pub mode: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// User and group that made it.
    pub creator: (u32, u32),
}

impl Owner {
    fn of(owner: &sysv::Owner, maps: &IdMaps) -> Owner {
        let (uid, gid) = maps.inner(owner.uid, owner.gid);
        Owner {
            key: owner.key,
            mode: owner.mode & 0o777,
            uid,
            gid,
            creator: maps.inner(owner.creator_uid, owner.creator_gid),
        }
    }

    fn outside(&self, maps: &IdMaps) -> sysv::Owner {
        let (mode, uid, gid) = maps.outer_owner((self.mode, self.uid, self.gid));
        let (_, creator_uid, creator_gid) = maps.outer_owner((0, self.creator.0, self.creator.1));
        sysv::Owner {
            key: self.key,
            uid,
            gid,
            creator_uid,
            creator_gid,
            mode,
        }
    }
}

impl State {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty() && self.semaphores.is_empty() && self.queues.is_empty() && self.limits.is_empty()
    }

    fn what(&self) -> String {
        let counts = [
            (self.segments.len(), Kind::Shm),
            (self.semaphores.len(), Kind::Sem),
            (self.queues.len(), Kind::Msg),
        ];
        listed(&counts)
    }
}

/// What an object of a kind is called.
fn noun(kind: Kind) -> &'static str {
    match kind {
        Kind::Shm => "System V shared memory",
        Kind::Sem => "System V semaphores",
        Kind::Msg => "System V message queue",
    }
}

fn name(kind: Kind, id: i32, key: i32) -> String {
    match key {
        0 => format!("{} {id} (key IPC_PRIVATE)", noun(kind)),
        key => format!("{} {id} (key {key:#x})", noun(kind)),
    }
}

/// What collecting needs to know.
#[derive(Debug)]
pub struct Scene<'a> {
    /// The container's init.
    pub init: Pid,
    /// Every process that was stopped.
    pub stopped: &'a [Pid],
    /// The container's ids of the processes that are saved.
    pub inner: &'a BTreeMap<Pid, i32>,
    /// How the container numbers users.
    pub maps: &'a IdMaps,
    /// Whether the spec gives the container a namespace of its own.
    pub is_own: bool,
}

/// What is in the namespace of a stopped container; `None` when it is not its own.
///
/// # Errors
/// Refused: POSIX message queues, and what could not be made again.
pub fn collect(
    scene: &Scene<'_>,
    shared: &mut shared::Table,
    blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>,
    warnings: &mut Vec<String>,
) -> Result<Option<State>> {
    let init = scene.init;
    let me = std::process::id() as Pid;
    let of = |pid: Pid| proc::namespace(pid, "ipc").about(pid, "ipc namespace");
    if !scene.is_own || of(init)? == of(me)? {
        warnings.extend(left(init)?);
        return Ok(None);
    }
    let seen = namespace::within(init, &["ipc"], Seen::look).about(init, "ipc namespace")?;
    if let Some(queue) = seen.posix.first() {
        return Err(Error::unsupported(
            init,
            format!("POSIX message queue /{}", queue.escape_ascii()),
            "it is not carried yet",
            "remove it first, by mq_unlink(3) or in /dev/mqueue",
        ));
    }
    let limits = limits::collect(init)?;
    let mut state = State {
        limits: limits.changed,
        ..State::default()
    };
    let mut found = segments::Found::of(scene, &seen.segments)?;
    for (id, segment) in &seen.segments {
        let file = found.take(*id)?;
        state
            .segments
            .push(segments::collect(scene, *id, segment, file, &limits.now, shared)?);
    }
    segments::check_orphans(init, &state.segments, &limits.now, &seen.segments)?;
    for (id, set, pids) in &seen.sets {
        state
            .semaphores
            .push(semaphores::collect(scene, *id, set, pids, &limits.now)?);
    }
    for (id, queue, messages) in &seen.queues {
        state.queues.push(queues::collect(
            scene,
            *id,
            queue,
            messages.as_deref(),
            &limits.now,
            blob,
        )?);
    }
    Ok(Some(state))
}

/// What to report of a namespace that others have as well.
fn left(init: Pid) -> Result<Option<String>> {
    let count = || {
        let of = |kind| sysv::list(kind).map(|ids| (ids.len(), kind));
        [Kind::Shm, Kind::Sem, Kind::Msg]
            .map(of)
            .into_iter()
            .collect::<torpor_sys::Result<Vec<_>>>()
    };
    let counts = namespace::within(init, &["ipc"], count).about(init, "ipc namespace")?;
    let found = listed(&counts);
    Ok((!found.is_empty()).then(|| format!("the IPC namespace is not the container's own: it is not saved ({found})")))
}

fn listed(counts: &[(usize, Kind)]) -> String {
    let some = counts.iter().filter(|c| c.0 > 0);
    let words: Vec<String> = some.map(|(n, kind)| format!("{n} {}", noun(*kind))).collect();
    words.join(", ")
}

/// What a thread in the namespace sees.
struct Seen {
    segments: Vec<(i32, sysv::Segment)>,
    sets: Vec<(i32, sysv::Set, Vec<Pid>)>,
    queues: Vec<(i32, sysv::Queue, Option<Vec<sysv::Message>>)>,
    posix: Vec<Vec<u8>>,
}

impl Seen {
    fn look() -> torpor_sys::Result<Seen> {
        let all = |kind| sysv::list(kind).map(Vec::into_iter);
        let set = |id| {
            let set = sysv::set(id)?;
            let pids: torpor_sys::Result<_> = (0..set.values.len()).map(|n| sysv::last_pid(id, n)).collect();
            Ok((id, set, pids?))
        };
        let queue = |id| {
            let queue = sysv::queue(id)?;
            Ok((id, queue, sysv::messages(id, &queue)?))
        };
        Ok(Seen {
            segments: all(Kind::Shm)?
                .map(|id| Ok((id, sysv::segment(id)?)))
                .collect::<torpor_sys::Result<_>>()?,
            sets: all(Kind::Sem)?.map(set).collect::<torpor_sys::Result<_>>()?,
            queues: all(Kind::Msg)?.map(queue).collect::<torpor_sys::Result<_>>()?,
            posix: tree::message_queues()?,
        })
    }
}

/// # Errors
/// Refused: a new container that has no namespace of its own for what is in the image, and claims beyond its spec.
pub fn plan(state: &State, shared: &[shared::State], init: Pid, bounds: &Bounds) -> Result<()> {
    let me = std::process::id() as Pid;
    let of = |pid: Pid| proc::namespace(pid, "ipc").about(pid, "ipc namespace");
    let has_objects = !state.what().is_empty();
    if has_objects && (!bounds.has_own_ipc || of(init)? == of(me)?) {
        return Err(Error::unsupported(
            init,
            "IPC namespace",
            format!(
                "the image holds {}, and the container shares its namespace",
                state.what()
            ),
            "give the container an IPC namespace of its own",
        ));
    }
    segments::plan(&state.segments, shared, init, bounds)?;
    queues::plan(&state.queues, init, bounds)
}

/// Drops limits that the new container may not change, or sets itself.
pub fn lower(state: &mut State, bounds: &Bounds) -> Vec<String> {
    let wanted = std::mem::take(&mut state.limits);
    let mut said = Vec::new();
    for (name, value) in wanted {
        if !limits::is_known(&name) || bounds.sysctls.contains(&name) {
            continue;
        }
        if bounds.may_change_limits() {
            state.limits.insert(name, value);
        } else {
            said.push(format!(
                "{name} was {value}, which the container may not set: it stays as it is"
            ));
        }
    }
    said
}

/// The namespace of a container that is being built.
#[derive(Debug, Default)]
pub struct Made {
    /// Shared memory, by id.
    pub files: BTreeMap<i32, OwnedFd>,
    /// Keeps it until processes have attached it.
    held: Vec<sysv::Attached>,
}

impl Made {
    /// The file of a segment.
    pub fn file(&self, id: i32) -> Result<OwnedFd> {
        let file = self.files.get(&id).map(OwnedFd::try_clone);
        let file =
            file.ok_or_else(|| Error::nonsense(format!("System V shared memory {id} is not in the namespace")))?;
        let file = file.map_err(|e| torpor_sys::Error::io("dup", "System V shared memory", &e));
        file.about(1, "System V shared memory")
    }

    /// Processes have attached what they had.
    pub fn release(&mut self) {
        self.held.clear();
    }
}

/// Makes everything again, semaphores without their values: those come last, see [`semaphores`].
pub fn rebuild(state: &State, shared: &[shared::State], image: &Reader, init: Pid) -> Result<Made> {
    if state.is_empty() {
        return Ok(Made::default());
    }
    let maps = IdMaps::of(init)?;
    let texts = queues::texts(&state.queues, image)?;
    let size = |id: i32| segments::size_of(shared, id);
    let made = namespace::within(init, &["ipc"], || {
        limits::rebuild(&state.limits)?;
        let mut made = Made::default();
        for segment in segments::in_order(&state.segments) {
            let (held, file) = segments::rebuild(segment, size(segment.id), &maps)?;
            made.held.push(held);
            made.files.insert(segment.id, file);
        }
        for set in &state.semaphores {
            semaphores::rebuild(set, &maps)?;
        }
        queues::rebuild(&state.queues, &texts, &maps)?;
        Ok(made)
    });
    made.about(init, "System V IPC")
}

/// Sets what must come when all processes are there.
pub fn finish(state: &State, init: Pid, lives: impl Fn(i32) -> bool + Sync) -> Result<()> {
    if state.is_empty() {
        return Ok(());
    }
    let done = namespace::within(init, &["ipc"], || {
        for set in &state.semaphores {
            semaphores::finish(set, &lives)?;
        }
        limits::finish(&state.limits)
    });
    done.about(init, "System V IPC")
}

/// Makes an object of a kind with its old id, as the user that made it: in a thread of its own in the namespace.
fn make(
    kind: Kind,
    id: i32,
    owner: &sysv::Owner,
    make: impl FnOnce() -> torpor_sys::Result<i32>,
) -> torpor_sys::Result<()> {
    sysv::ask_for_id(kind, id)?;
    sysv::act_as(owner.creator_uid, owner.creator_gid)?;
    let made = make()?;
    if made == id {
        return Ok(());
    }
    let why = format!("{} is {made} now", name(kind, id, owner.key));
    Err(torpor_sys::Error::Unsuitable { pid: 1, why })
}

/// Whether a mapping is of a System V segment, by what maps(5) and the kernel's own file systems say. Its id is the
/// number of its inode, which may be 0.
pub fn is_segment(vma: &Vma) -> bool {
    vma.name.starts_with("/SYSV") && shared::is_kernels_device(vma.dev)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_have_names() {
        let key = 0xff00_0001_u32 as i32;
        assert_eq!(name(Kind::Sem, 3, key), "System V semaphores 3 (key 0xff000001)");
        assert_eq!(name(Kind::Shm, 7, 0), "System V shared memory 7 (key IPC_PRIVATE)");
    }

    #[test]
    fn limits_need_the_right_to_set_them() {
        let state = || State {
            limits: [("kernel/shmmax", "1"), ("kernel/msgmax", "2"), ("kernel/panic", "3")]
                .map(|(n, v)| (n.to_owned(), v.to_owned()))
                .into(),
            ..State::default()
        };
        let spec = |capability: &str| {
            serde_json::json!({"process": {"capabilities": {"bounding": [capability]}},
                "linux": {"namespaces": [{"type": "ipc"}], "sysctl": {"kernel.msgmax": "5"}}})
        };
        let mut granted = state();
        assert!(lower(&mut granted, &Bounds::of(&spec("CAP_SYS_ADMIN"))).is_empty());
        assert_eq!(granted.limits.keys().collect::<Vec<_>>(), ["kernel/shmmax"]);
        let mut not = state();
        let said = lower(&mut not, &Bounds::of(&spec("CAP_CHOWN")));
        assert!(not.limits.is_empty());
        assert_eq!(said.len(), 1);
        assert!(said[0].starts_with("kernel/shmmax was 1"), "{said:?}");
    }
}
