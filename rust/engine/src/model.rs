//! What a container is made of, as it is written into the image: a graph. Processes hold threads, an address
//! space and a descriptor table; descriptors point to open file descriptions; those to objects. What is shared
//! is stored once and referred to by index.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::kinds::{self, files::Description};

/// Everything but the bytes of memory.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Inventory {
    /// Parents before their children; the first is the container's init.
    pub processes: Vec<Process>,
    /// Open file descriptions.
    pub descriptions: Vec<Description>,
    /// What descriptions and mappings share.
    pub objects: kinds::objects::Objects,
    /// The kernel's vdso and data pages, as far as a restore must find them again.
    pub vdso: kinds::vdso::State,
    /// What the monotonic clocks showed; `None` in an image that does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clocks: Option<kinds::clocks::State>,
    /// Where what is mounted.
    #[serde(default)]
    pub mounts: Vec<kinds::mounts::State>,
    /// Files in memory.
    #[serde(default)]
    pub tmpfs: Vec<kinds::tmpfs::State>,
    /// What is in its IPC namespace; `None` when that is not its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipc: Option<kinds::ipc::State>,
    /// The container's terminal, when it has one.
    pub console: Option<kinds::console::State>,
    /// What was seen and left out, in words.
    pub warnings: Vec<String>,
}

/// One process, or a zombie. Ids are those of the container's own pid namespace.
#[derive(Debug, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id; 0 for init.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// The signal its parent gets when it ends.
    pub exit_signal: i32,
    /// What is left of it when it has ended and nobody has waited for it: the status for wait(2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zombie: Option<i32>,
    /// The name of a zombie, which it keeps.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Everything that a zombie has no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<Body>,
}

/// What only a living process has.
#[derive(Debug, Serialize, Deserialize)]
pub struct Body {
    /// The leader first.
    pub threads: Vec<Thread>,
    /// The address space.
    pub memory: kinds::memory::State,
    /// The descriptor table.
    pub fds: Vec<kinds::files::Descriptor>,
    /// Root, working directory, umask.
    pub fs: kinds::fs::State,
    /// Signal actions and signals pending for the whole process.
    pub signals: kinds::signals::ProcessState,
    /// Interval timers.
    pub timers: kinds::timers::State,
    /// Timers made by timer_create(2).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub posix_timers: Vec<kinds::posix_timers::State>,
    /// File locks that belong to the process.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locks: Vec<kinds::locks::Posix>,
    /// What is done to System V semaphores when it ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undo: Vec<kinds::ipc::semaphores::Undo>,
    /// Limits and other settings of the process.
    pub settings: kinds::settings::ProcessState,
    /// What is held for it by another process.
    #[serde(default, skip_serializing_if = "kinds::sharing::State::is_nothing")]
    pub sharing: kinds::sharing::State,
}

/// One thread.
#[derive(Debug, Serialize, Deserialize)]
pub struct Thread {
    /// Its id.
    pub tid: i32,
    /// Registers.
    pub cpu: kinds::cpu::State,
    /// Mask, pending signals, alternate stack.
    pub signals: kinds::signals::ThreadState,
    /// Who it acts as.
    pub creds: kinds::creds::State,
    /// Which system calls it may make.
    #[serde(flatten)]
    pub seccomp: kinds::seccomp::Mode,
    /// Name, robust list, clear_child_tid, rseq.
    pub settings: kinds::settings::ThreadState,
    /// What it has apart from its process.
    #[serde(default, skip_serializing_if = "kinds::sharing::Own::is_nothing")]
    pub own: kinds::sharing::Own,
}

impl Body {
    /// Its descriptor table, unless another process holds it, and those of its threads.
    pub fn tables(&self) -> impl Iterator<Item = &[kinds::files::Descriptor]> {
        let of_threads = self.threads.iter().filter_map(|t| t.own.fds.as_deref());
        std::iter::once(self.fds.as_slice()).chain(of_threads)
    }
}

impl Process {
    /// A process of which nothing is known but its id.
    pub fn without_body(pid: i32) -> Process {
        Process {
            pid,
            ppid: 0,
            pgid: 0,
            sid: 0,
            exit_signal: 0,
            zombie: None,
            name: String::new(),
            body: None,
        }
    }
}

impl Inventory {
    /// Number of threads of all living processes.
    pub fn tasks(&self) -> usize {
        self.processes
            .iter()
            .filter_map(|p| p.body.as_ref())
            .map(|b| b.threads.len())
            .sum()
    }

    /// Whether a thread catches its own system calls.
    pub fn dispatches(&self) -> bool {
        let mut bodies = self.processes.iter().filter_map(|p| p.body.as_ref());
        bodies.any(|b| b.threads.iter().any(|t| t.cpu.dispatch.is_some()))
    }

    /// What a reader must know to restore this, beyond format 1.0.
    pub fn requires(&self) -> BTreeSet<&'static str> {
        let bodies = || self.processes.iter().filter_map(|p| p.body.as_ref());
        let is_apart = |body: &Body| !body.sharing.is_nothing() || body.threads.iter().any(|t| !t.own.is_nothing());
        let sharing = bodies().any(is_apart).then_some(torpor_image::SHARING);
        let of_objects = self.descriptions.iter().filter_map(|d| d.object.requires());
        let has_ipc = self.ipc.as_ref().is_some_and(|ipc| !ipc.is_empty());
        let ipc = has_ipc.then_some(torpor_image::SYSTEM_V);
        of_objects.chain(sharing).chain(ipc).collect()
    }

    /// Every descriptor table once.
    pub fn tables(&self) -> impl Iterator<Item = &[kinds::files::Descriptor]> {
        let bodies = self.processes.iter().filter_map(|p| p.body.as_ref());
        bodies.flat_map(Body::tables)
    }

    /// The descriptor table that a process uses.
    pub fn table_of<'b>(&'b self, body: &'b Body) -> &'b [kinds::files::Descriptor] {
        &self.holder(body, body.sharing.files).fds
    }

    /// The address space that a process uses.
    pub fn memory_of<'b>(&'b self, body: &'b Body) -> &'b kinds::memory::State {
        &self.holder(body, body.sharing.memory).memory
    }

    /// The process that holds the memory of `pid`: another one, or itself.
    pub fn memory_holder(&self, pid: i32) -> i32 {
        let mut all = self.processes.iter().filter(|p| p.pid == pid);
        let of = all.find_map(|p| p.body.as_ref()?.sharing.memory);
        of.unwrap_or(pid)
    }

    fn holder<'b>(&'b self, body: &'b Body, of: Option<i32>) -> &'b Body {
        let holds = |p: &&Process| Some(p.pid) == of;
        let holder = self.processes.iter().find(holds).and_then(|p| p.body.as_ref());
        holder.unwrap_or(body)
    }

    /// Closes every TCP connection that leads out of the container.
    pub fn close_outside(&mut self) {
        let states = self.descriptions.iter_mut().filter_map(|d| match &mut d.object {
            kinds::files::Object::Inet(state) => Some(state),
            _ => None,
        });
        self.warnings.extend(states.filter_map(|s| s.close_outside()));
    }
}
