//! From a blank process to a whole tree, stopped and complete but for the bytes of memory.
//!
//! The container's init waits in the launcher, with all privileges. It is seized there, emptied but for the stub,
//! and everything else grows from it: children by clone3(2) with their old ids, then each process's files,
//! mappings and settings. All of it carries PTRACE_O_EXITKILL: half a container never outlives its tracer.

mod clock;
mod descriptors;
mod inherit;
mod late;
mod missing;
mod nursery;
mod objects;
mod orphans;
pub mod pages;
mod process;
mod terminals;
mod thread;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::Duration;

use torpor_image::Reader;
use torpor_sys::ptrace::{self, Options};
use torpor_sys::remote::site::{self, Place};
use torpor_sys::remote::{Arg, Batch, Site};
use torpor_sys::wait;
use torpor_sys::{PAGE_SIZE, Pid, fork, pidfd, proc};

use crate::bounds::Bounds;
use crate::error::{About, Error, Result};
use crate::kinds::ipc::segments;
use crate::kinds::sharing::Births;
use crate::kinds::unchanged::Unchanged;
use crate::kinds::{memory, shared, tmpfs, vdso};
use crate::model::Inventory;
use crate::stage::Cancel;

pub use inherit::Shares;
pub use late::Late;
use nursery::Nursery;
pub use objects::Objects;
pub use tree::Lineage;

const TABLE: u64 = 512 * 1024;
const LIMIT: Duration = Duration::from_secs(10);

/// A tree of processes that is being built. Dropping it ends all of them.
#[derive(Debug)]
pub struct Skeleton {
    /// The container's init, in our pid namespace.
    pub init: Pid,
    /// Main threads by the container's process id.
    pub sites: BTreeMap<i32, Site>,
    /// Other threads: (container's thread id, site), by the container's process id.
    pub threads: BTreeMap<i32, Vec<(i32, Site)>>,
    /// Pseudo-terminals, by the index of the inventory.
    terminals: Vec<terminals::Made>,
    /// What the container's programs may do at most: init opens files within it.
    bounds: Bounds,
    /// What files that the image does not hold must still be.
    files: Unchanged,
    /// What init's standard streams were.
    pub stdio: [Option<OwnedFd>; 3],
    /// Where a `syscall` instruction is in the vdso, from its start.
    pub syscall_offset: u64,
    /// Start and length of the kernel's parts in the blank process.
    kernel: Vec<(u64, u64)>,
    place: Place,
    /// Our end of the socket that every process of the tree has at number `base`.
    transport: Option<OwnedFd>,
    /// Descriptors from here on are ours while we build.
    base: i32,
    all: Vec<Pid>,
    /// Processes that have been laid out.
    laid_out: BTreeSet<i32>,
    /// What was laid out already in the parent of a process when it was made.
    born_with: BTreeMap<i32, Layout>,
    /// What entering the time namespace came to, when that is done already.
    time: Option<Option<String>>,
    done: bool,
}

/// What matters of a layout that a process is born with.
#[derive(Debug, Clone)]
struct Layout {
    kernel: Vec<(u64, u64)>,
    exe: memory::Source,
}

/// The addresses that System V shared memory takes when it is attached.
fn attached(areas: &[memory::Area], shared: &[shared::State]) -> Result<Vec<(u64, u64)>> {
    let segment = |index: usize| shared.get(index).and_then(shared::State::segment);
    let all = segments::attachments(areas.iter(), segment)?;
    Ok(all.iter().map(segments::Attachment::range).collect())
}

fn kernel_ranges(kernel: &[(u64, u64)]) -> Vec<(u64, u64)> {
    kernel.iter().map(|k| (k.0, k.0 + k.1)).collect()
}

impl Drop for Skeleton {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let _ = fork::kill(self.init, 9);
        wait::all_gone(&self.all, LIMIT);
    }
}

/// Builds the whole tree of `inventory` out of the waiting process `init`.
pub fn build(
    inventory: &Inventory,
    image: &Reader,
    init: Pid,
    bounds: &Bounds,
    files: Unchanged,
    background: bool,
    cancel: &Cancel,
) -> Result<(Skeleton, Objects, Shares)> {
    let mut skeleton = Skeleton::blank(inventory, init, bounds)?;
    skeleton.files = files;
    skeleton.connect()?;
    skeleton.enter_time_early(inventory)?;
    tmpfs::rebuild(&inventory.tmpfs, image, init, bounds, cancel)?;
    let mut files = objects::rebuild_files(&skeleton, inventory, image, cancel)?;
    // What comes later cannot be common.
    let shares = if background {
        Shares::none(inventory)
    } else {
        Shares::of(inventory, image)
    };
    let births = Births::plan(inventory, &Lineage::of(inventory))?;
    let nursery = Nursery {
        inventory,
        births: &births,
        image,
        cancel,
        files: &files,
        shares: &shares,
    };
    skeleton.make_terminals(inventory)?;
    skeleton.grow(&nursery)?;
    for index in 0..inventory.processes.len() {
        cancel.check()?;
        nursery.complete(&mut skeleton, index)?;
    }
    files.release_segments();
    let objects = objects::rebuild(&skeleton, inventory, image, files)?;
    skeleton.finish_terminals(inventory, &objects.descriptions)?;
    Ok((skeleton, objects, shares))
}

impl Skeleton {
    /// A single process `pid`, with nothing in its memory but the stub and the kernel's parts.
    pub fn blank(inventory: &Inventory, pid: Pid, bounds: &Bounds) -> Result<Skeleton> {
        let skeleton = Skeleton::seize(inventory, pid, bounds)?;
        skeleton.empty()?;
        Ok(skeleton)
    }

    /// Takes hold of the blank process and gives it the stub.
    fn seize(inventory: &Inventory, init: Pid, bounds: &Bounds) -> Result<Skeleton> {
        let options = Options::EXIT_KILL.and(Options::SUSPEND_SECCOMP).and(Options::FOLLOW);
        ptrace::seize(init, options).about(init, "init")?;
        ptrace::interrupt(init).about(init, "init")?;
        wait_stop(init)?;
        ptrace::set_sigmask(init, !(1 << (libc::SIGTRAP - 1))).about(init, "init")?;
        let vmas = proc::maps(init).about(init, "maps")?;
        let kernel: Vec<(u64, u64)> = vmas
            .iter()
            .filter(|v| vdso::is_part(v))
            .map(|v| (v.start, v.len()))
            .collect();
        let bodies = || inventory.processes.iter().filter_map(|p| p.body.as_ref());
        let mut taken: Vec<(u64, u64)> = vmas.iter().map(|v| (v.start, v.end)).collect();
        taken.extend(bodies().flat_map(|b| b.memory.areas.iter().map(|a| (a.start, a.end))));
        for body in bodies() {
            taken.extend(attached(&body.memory.areas, &inventory.objects.shared)?);
        }
        taken.extend(bodies().flat_map(|b| b.memory.kernel.iter().map(|k| (k.0, k.0 + k.1))));
        let parking: u64 = kernel.iter().map(|k| k.1).sum();
        let base = memory::common_hole(&taken, PAGE_SIZE + TABLE + parking)
            .ok_or_else(|| Error::unsupported(1, "address space", "the image leaves no room to build it", ""))?;
        let place = Place { base, table_len: TABLE };
        let memory = memory::open(init)?;
        let missing = || Error::unsupported(1, "vdso", "this kernel gives none", "boot it with vdso=1");
        let syscall_at = vdso::syscall_instruction(&memory, &vmas)?.ok_or_else(missing)?;
        let code = vmas.iter().find(|v| v.name == "[vdso]").ok_or_else(missing)?;
        let fds = inventory.tables().flatten().map(|d| d.fd);
        let mut skeleton = Skeleton {
            init,
            sites: BTreeMap::new(),
            threads: BTreeMap::new(),
            terminals: Vec::new(),
            bounds: bounds.clone(),
            files: Unchanged::default(),
            stdio: stdio(init)?,
            syscall_offset: syscall_at - code.start,
            kernel,
            place,
            transport: None,
            // Above every number in use and above those that a message of descriptors may take.
            base: fds.max().unwrap_or(0).max(descriptors::AT_ONCE as i32) + 1,
            all: vec![init],
            laid_out: BTreeSet::new(),
            born_with: BTreeMap::new(),
            time: None,
            done: false,
        };
        skeleton.leave_rseq(syscall_at)?;
        let site = Site::found(init, place, syscall_at).about(init, "stub")?;
        skeleton.sites.insert(inventory.processes[0].pid, site);
        Ok(skeleton)
    }

    /// The launcher's C library has registered a piece of memory that is about to go.
    fn leave_rseq(&mut self, syscall_at: u64) -> Result<()> {
        const UNREGISTER: u64 = 1;
        if let Some(rseq) = ptrace::rseq(self.init).about(self.init, "rseq")? {
            let args = [
                rseq.address,
                rseq.length.into(),
                UNREGISTER,
                rseq.signature.into(),
                0,
                0,
            ];
            site::call_at(self.init, syscall_at, libc::SYS_rseq, args).about(self.init, "rseq")?;
        }
        Ok(())
    }

    fn root(&self) -> Result<&Site> {
        self.sites
            .values()
            .find(|s| s.tid() == self.init)
            .ok_or_else(|| Error::nonsense("no init"))
    }

    /// Takes everything from the blank process but the stub and the kernel's parts.
    fn empty(&self) -> Result<()> {
        let mut batch = Batch::new();
        self.clear(&mut batch, &kernel_ranges(&self.kernel));
        batch.must(
            "close_range",
            libc::SYS_close_range,
            [0.into(), u32::MAX.into(), 0.into()],
        );
        batch.must("set_robust_list", libc::SYS_set_robust_list, [0.into(), 24.into()]);
        batch.must("set_tid_address", libc::SYS_set_tid_address, [0.into()]);
        self.root()?.run(&batch).about(self.init, "blank process").map(drop)
    }

    /// Unmaps everything but the stub and what is to be kept.
    fn clear(&self, batch: &mut Batch, keep: &[(u64, u64)]) {
        let mut keep = keep.to_vec();
        keep.push((self.place.base, self.place.base + self.place.len()));
        keep.sort_unstable();
        memory::clear(batch, &keep);
    }

    /// Makes the socket over which descriptors are sent in: at the same number in every process, since all
    /// descend from init.
    fn connect(&mut self) -> Result<()> {
        let mut batch = Batch::new();
        let limit = proc::limits(self.init).about(self.init, "limits")?[libc::RLIMIT_NOFILE as usize];
        let mut bytes = limit.1.to_le_bytes().to_vec();
        bytes.extend_from_slice(&limit.1.to_le_bytes());
        let new = batch.data(&bytes);
        let which = libc::RLIMIT_NOFILE;
        batch.must(
            "prlimit64",
            libc::SYS_prlimit64,
            [0.into(), which.into(), new.into(), 0.into()],
        );
        let pair = batch.room(8);
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        batch.must(
            "socketpair",
            libc::SYS_socketpair,
            [libc::AF_UNIX.into(), kind.into(), 0.into(), pair.into()],
        );
        let theirs = Arg::Word(pair.skip(4));
        batch.must(
            "dup3",
            libc::SYS_dup3,
            [theirs, self.base.into(), libc::O_CLOEXEC.into()],
        );
        batch.must("close", libc::SYS_close, [theirs]);
        // The other end has to be pulled out before it is closed, so it is closed by the next batch.
        let results = self.root()?.run(&batch).about(self.init, "transport")?;
        let pidfd = pidfd::open(self.init).about(self.init, "pidfd")?;
        let number = results.i32(pair);
        self.transport = Some(pidfd::get_fd(&pidfd, number).about(self.init, "transport")?);
        let mut batch = Batch::new();
        batch.must("close", libc::SYS_close, [number.into()]);
        self.root()?.run(&batch).about(self.init, "transport").map(drop)
    }

    /// The site of a process.
    pub fn site(&self, pid: i32) -> Result<&Site> {
        self.sites
            .get(&pid)
            .ok_or_else(|| Error::nonsense(format!("no process {pid}")))
    }

    /// Every thread of the tree, as our pid namespace numbers it.
    pub fn tids(&self) -> &[Pid] {
        &self.all
    }

    /// Nothing is to be ended any more: the tree runs.
    pub fn finish(mut self) {
        self.done = true;
    }
}

fn wait_stop(tid: Pid) -> Result<()> {
    match wait::interrupted(tid, LIMIT, |_| {}).about(tid, "init")? {
        Some(_) => Ok(()),
        None => {
            let how = "before it could be restored into".into();
            Err(torpor_sys::Error::Died { pid: tid, how }).about(tid, "init")
        }
    }
}

/// Descriptors of ours for the standard streams of the waiting process.
fn stdio(init: Pid) -> Result<[Option<OwnedFd>; 3]> {
    let process = pidfd::open(init).about(init, "pidfd")?;
    Ok([0, 1, 2].map(|n| pidfd::get_fd(&process, n).ok()))
}
