//! From a stopped container to its description: everything but the bytes of memory.
//!
//! What can be read from outside is read from outside; what only the task itself can ask the kernel for is asked
//! by one batch per thread.

use std::collections::BTreeMap;

use torpor_image::BlobRef;
use torpor_sys::mem::Memory;
use torpor_sys::proc::{self, Stat, Status, Vma};
use torpor_sys::ptrace::{self, Rseq};
use torpor_sys::remote::visit::Host;
use torpor_sys::remote::{Batch, Door};
use torpor_sys::{Pid, kcmp};

use crate::advance::Advance;
use crate::build::Lineage;
use crate::error::{About, Error, Result};
use crate::freeze::{Frozen, FrozenProcess};
use crate::kinds::inet::{Hold, connection::Policy};
use crate::kinds::{
    cgroups, clocks, console, cpu, creds, files, fs, ipc, keyrings, landlock, memory, mounts, paths, posix_timers,
    restart, seccomp, settings, shared, sharing, signals, tasks, timers, tmpfs, vdso,
};
use crate::model::{Body, Inventory, Process, Thread};
use crate::track::Tracking;

/// Room for the table of a visit, in bytes.
const TABLE: u64 = 64 * 1024;

/// A process whose memory is to be captured: our pid for it and its place in the inventory.
#[derive(Debug)]
pub struct Source {
    /// Our id for it.
    pub pid: Pid,
    /// Index in [`Inventory::processes`].
    pub index: usize,
    /// What a visit needs to know of it.
    pub host: Host,
    /// Its mappings.
    pub vmas: Vec<Vma>,
    /// Whether their flags were read before it stopped and are still to be confirmed.
    pub is_assumed: bool,
}

/// What collecting gives: the inventory, and where the bytes are.
#[derive(Debug)]
pub struct Collected {
    /// The description.
    pub inventory: Inventory,
    /// Living processes.
    pub sources: Vec<Source>,
    /// Shared objects, open for reading, in the order of the inventory.
    pub shared: Vec<std::os::fd::OwnedFd>,
    /// What keeps the peers of TCP connections waiting.
    pub hold: Option<Hold>,
}

/// Names of processes: ours and the container's.
#[derive(Debug, Default)]
struct Names(BTreeMap<Pid, i32>);

impl Names {
    fn inner(&self, pid: Pid) -> Option<i32> {
        self.0.get(&pid).copied()
    }
}

fn last(ids: &[Pid]) -> i32 {
    ids.last().copied().unwrap_or(0)
}

/// One process as far as /proc tells.
struct Subject<'f> {
    frozen: &'f FrozenProcess,
    stat: Stat,
    status: Status,
    vmas: Vec<Vma>,
    is_assumed: bool,
    memory: Memory,
    /// Its address space is that of a process that is described already.
    is_elsewhere: bool,
}

/// Collects. `advance` is what is known already; `blob` stores bytes in the image. `tracking` says which mappings are watched by us; with `memory_only` the
/// contents of file systems in memory are left out; `has_own_ipc` is what the spec says of the container's IPC namespace.
pub fn collect(
    frozen: &Frozen,
    mut advance: Advance,
    tracking: &Tracking,
    memory_only: bool,
    has_own_ipc: bool,
    policy: Policy,
    blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>,
) -> Result<Collected> {
    let init = frozen
        .processes
        .first()
        .map(|p| p.pid)
        .ok_or_else(|| Error::nonsense("no process"))?;
    let mut inventory = Inventory::default();
    let view = paths::View::of(init)?;
    let mounts = mounts::Table::of(init)?;
    mounts.check()?;
    inventory.mounts = mounts.seen();
    let maps = creds::IdMaps::of(init)?;
    let mut tables = memory::Tables {
        view: &view,
        tracking,
        mapped: Vec::new(),
        shared: shared::Table::of(maps.clone()),
    };
    let members = members(frozen, init, &mut inventory.warnings)?;
    let tasks: Vec<(Pid, &[Pid])> = members.iter().map(|m| (m.pid, m.threads.as_slice())).collect();
    let sharing = sharing::Survey::of(&tasks)?;
    let names = Names(
        members
            .iter()
            .filter_map(|p| Some((p.pid, inner_pid(p.pid)?)))
            .collect(),
    );
    let stopped: Vec<Pid> = frozen.processes.iter().map(|p| p.pid).collect();
    let scene = ipc::Scene {
        init,
        stopped: &stopped,
        inner: &names.0,
        maps: &maps,
        is_own: has_own_ipc,
    };
    inventory.ipc = ipc::collect(&scene, &mut tables.shared, blob, &mut inventory.warnings)?;
    let sets = inventory.ipc.as_ref().map_or(&[][..], |ipc| &ipc.semaphores);
    let mut semaphores = ipc::semaphores::Watch::new(sets)?;
    let mut survey = files::Survey::default();
    // All before the first file is opened for a look: a program that watches it would have an event to read.
    let fd_tables = fd_tables(&members, &sharing, &mut survey)?;
    survey.add_in_flight(init)?;
    let table_of = |task: Pid| {
        let own = fd_tables.iter().find(|(of, _)| *of == task);
        own.map(|(_, table)| table.clone()).unwrap_or_default()
    };
    inventory.vdso = vdso::collect(blob)?;
    let mut sources = Vec::new();
    let groups = cgroups::Watch::of(init)?;
    let mut watch = restart::Watch::default();
    let mut landlock = landlock::Watch::new(init, &maps);
    for process in &members {
        let holder = sharing.holder(kcmp::Kind::Vm, process.pid);
        let known = sources.iter().find(|s: &&Source| s.pid == holder);
        let subject = Subject::of(process, known.map(|s| s.vmas.as_slice()), &mut advance)?;
        check_namespaces(process.pid, init)?;
        groups.check(process)?;
        let mut ctx = Context {
            frozen,
            init,
            maps: &maps,
            tables: &mut tables,
            filters: &mut inventory.objects.seccomp,
            warnings: &mut inventory.warnings,
            watch: &mut watch,
            vdso: &inventory.vdso,
            landlock: &mut landlock,
            semaphores: &mut semaphores,
            blob,
            beside: instructions_beside(&members, &sharing, process.pid)?,
        };
        let (mut body, host) = subject.body(&mut ctx)?;
        body.sharing = sharing.state(process.pid, |pid| names.inner(pid));
        if body.sharing.files.is_none() {
            body.fds = table_of(process.pid);
            body.locks = survey.locks(process.pid);
        }
        for (thread, tid) in body.threads.iter_mut().zip(&process.threads) {
            if sharing.is_apart(kcmp::Kind::Files, *tid) {
                thread.own.fds = Some(table_of(*tid));
                thread.own.locks = survey.locks(*tid);
            }
            if sharing.is_apart(kcmp::Kind::Fs, *tid) {
                let status = proc::status(*tid).about(*tid, "status")?;
                thread.own.fs = Some(fs::collect(*tid, &status, &maps)?);
            }
        }
        let described = subject.process(&names, Some(body))?;
        if holder == process.pid {
            sources.push(Source {
                pid: process.pid,
                index: inventory.processes.len(),
                host,
                is_assumed: subject.is_assumed,
                vmas: subject.vmas,
            });
        }
        inventory.processes.push(described);
        zombies(process.pid, &names, &mut inventory.processes)?;
    }
    inventory.warnings.extend(watch.report());
    let tasks = tasks::Tasks::of(members.iter().map(|m| m.pid));
    plan_sharing(&inventory)?;
    let mut naming = files::Naming {
        init,
        tasks: &tasks,
        maps: &maps,
        tables: &mut tables,
        ptys: Default::default(),
        pipes: Vec::new(),
        policy,
        hold: None,
        console: None,
        blob,
        warnings: Vec::new(),
    };
    inventory.descriptions = files::collect(&survey, &fd_tables, &mut naming)?;
    inventory.objects.pipes = naming.pipes;
    inventory.objects.ptys = naming.ptys.states;
    inventory.warnings.append(&mut naming.ptys.warnings);
    let hold = naming.hold;
    inventory.warnings.append(&mut naming.warnings);
    if let Some(fd) = &naming.console {
        inventory.console = Some(console::collect(init, fd, |pid| names.inner(pid))?);
    }
    // After everything that has a time left: nothing comes early by the clocks of the restored container.
    inventory.clocks = Some(clocks::collect(init)?);
    if !memory_only {
        // Last, since it may be much: by now nothing else is refused.
        inventory.tmpfs = tmpfs::collect(init, &mounts, &maps, blob, &mut inventory.warnings)?;
    }
    inventory.objects.mapped = tables.mapped;
    inventory.objects.shared = tables.shared.states;
    Ok(Collected {
        inventory,
        sources,
        shared: tables.shared.sources,
        hold,
    })
}

/// The processes that belong to init's tree, parents first. Others in the container were started by `exec`: they
/// have a parent outside, and end with it; they are stopped like all, but not saved.
fn members<'f>(frozen: &'f Frozen, init: Pid, warnings: &mut Vec<String>) -> Result<Vec<&'f FrozenProcess>> {
    let mut parents = BTreeMap::new();
    for process in &frozen.processes {
        parents.insert(process.pid, proc::stat(process.pid).about(process.pid, "stat")?.ppid);
    }
    let mut order: Vec<&FrozenProcess> = Vec::new();
    let mut at = 0;
    order.extend(frozen.processes.iter().filter(|p| p.pid == init));
    while at < order.len() {
        let parent = order[at].pid;
        let children = proc::children(parent).about(parent, "children")?;
        order.extend(
            children
                .iter()
                .filter_map(|c| frozen.processes.iter().find(|p| p.pid == *c)),
        );
        at += 1;
    }
    for process in &frozen.processes {
        if !order.iter().any(|p| p.pid == process.pid) {
            let name = proc::stat(process.pid).map(|s| s.comm).unwrap_or_default();
            warnings.push(format!(
                "process {} ({name}) was started by exec and is not saved",
                process.pid
            ));
        }
    }
    Ok(order)
}

fn inner_pid(pid: Pid) -> Option<i32> {
    proc::status(pid).ok().map(|s| last(&s.ns_pids))
}

/// # Errors
/// Refused: a process in other namespaces than init.
fn check_namespaces(pid: Pid, init: Pid) -> Result<()> {
    for kind in ["pid", "mnt", "net", "ipc", "uts", "user", "cgroup", "time"] {
        let (Ok(own), Ok(its)) = (proc::namespace(pid, kind), proc::namespace(init, kind)) else {
            continue;
        };
        if own != its {
            let why = "it has one of its own, which is not carried yet";
            return Err(Error::unsupported(pid, format!("{kind} namespace"), why, ""));
        }
    }
    for kind in ["pid", "time"] {
        let of_children = format!("{kind}_for_children");
        let Ok(its) = proc::namespace(pid, kind) else {
            continue;
        };
        // A pid namespace that nobody was born in yet cannot be read (kernel/pid_namespace.c, pidns_for_children_get).
        if proc::namespace(pid, &of_children).ok() != Some(its) {
            let why = "its children would be born in another one, which is not carried";
            return Err(Error::unsupported(pid, format!("{kind} namespace"), why, ""));
        }
    }
    Ok(())
}

/// Where the threads of all other processes are that use the memory of this one.
fn instructions_beside(members: &[&FrozenProcess], sharing: &sharing::Survey, pid: Pid) -> Result<Vec<u64>> {
    let holder = |pid| sharing.holder(kcmp::Kind::Vm, pid);
    let beside = members.iter().filter(|m| m.pid != pid && holder(m.pid) == holder(pid));
    let threads = beside.flat_map(|m| &m.threads);
    threads
        .map(|tid| Ok(ptrace::regs(*tid).about(*tid, "registers")?.rip))
        .collect()
}

/// The descriptor tables of all tasks that have one, by task. One that several processes share is read once.
fn fd_tables(
    members: &[&FrozenProcess],
    sharing: &sharing::Survey,
    survey: &mut files::Survey,
) -> Result<Vec<(Pid, Vec<files::Descriptor>)>> {
    let mut all: Vec<(Pid, Vec<files::Descriptor>)> = Vec::new();
    for process in members {
        let holder = sharing.holder(kcmp::Kind::Files, process.pid);
        let known = all.iter().find(|(of, _)| *of == holder);
        let table = match known {
            Some((_, table)) => table.clone(),
            None => survey.add_process(process.pid)?,
        };
        all.push((process.pid, table));
        for &tid in process
            .threads
            .iter()
            .filter(|t| sharing.is_apart(kcmp::Kind::Files, **t))
        {
            all.push((tid, survey.add_thread(tid)?));
        }
    }
    Ok(all)
}

/// # Errors
/// Refused: what a restore could not give back.
fn plan_sharing(inventory: &Inventory) -> Result<()> {
    sharing::plan(inventory, &Lineage::of(inventory))
}

/// Children that have ended and that nobody has waited for.
fn zombies(parent: Pid, names: &Names, all: &mut Vec<Process>) -> Result<()> {
    for child in proc::children(parent).about(parent, "children")? {
        let Ok(stat) = proc::stat(child) else { continue };
        if stat.state != 'Z' {
            continue;
        }
        let status = proc::status(child).about(child, "status")?;
        all.push(Process {
            pid: last(&status.ns_pids),
            ppid: names.inner(parent).unwrap_or(0),
            pgid: last(&status.ns_pgids),
            sid: last(&status.ns_sids),
            exit_signal: stat.exit_signal,
            zombie: Some(stat.exit_code),
            name: stat.comm,
            body: None,
        });
    }
    Ok(())
}

/// What collecting one process needs of the whole.
struct Context<'a, 'v> {
    frozen: &'a Frozen,
    init: Pid,
    maps: &'a creds::IdMaps,
    tables: &'a mut memory::Tables<'v>,
    filters: &'a mut Vec<seccomp::State>,
    warnings: &'a mut Vec<String>,
    watch: &'a mut restart::Watch,
    vdso: &'a vdso::State,
    landlock: &'a mut landlock::Watch<'v>,
    semaphores: &'a mut ipc::semaphores::Watch,
    blob: &'a mut dyn FnMut(&[u8]) -> Result<BlobRef>,
    /// Where threads of other processes are that use the same memory.
    beside: Vec<u64>,
}

/// A thread before its batch: what must be read before any code runs in it.
struct Before {
    tid: Pid,
    status: Status,
    rseq: Option<Rseq>,
    cpu: cpu::Settled,
}

/// A thread's questions.
struct Asked {
    process: Option<(
        signals::AskedProcess,
        settings::AskedProcess,
        [torpor_sys::remote::Data; 3],
    )>,
    stack: torpor_sys::remote::Data,
    creds: usize,
    keys: keyrings::Asked,
    landlock: Option<usize>,
    settings: settings::AskedThread,
}

impl<'f> Subject<'f> {
    /// `known` are the mappings, where another process has the same.
    fn of(frozen: &'f FrozenProcess, known: Option<&[Vma]>, advance: &mut Advance) -> Result<Subject<'f>> {
        let pid = frozen.pid;
        let status = proc::status(pid).about(pid, "status")?;
        if status.core_dumping {
            return Err(Error::unsupported(
                pid,
                "core dump",
                "it is writing one",
                "wait until it has ended",
            ));
        }
        let (vmas, is_assumed) = match known {
            Some(known) => (known.to_vec(), false),
            None => advance.settle(pid, &status)?,
        };
        Ok(Subject {
            frozen,
            stat: proc::stat(pid).about(pid, "stat")?,
            status,
            vmas,
            is_assumed,
            memory: memory::open(pid)?,
            is_elsewhere: known.is_some(),
        })
    }

    fn process(&self, names: &Names, body: Option<Body>) -> Result<Process> {
        Ok(Process {
            pid: last(&self.status.ns_pids),
            ppid: names.inner(self.stat.ppid).unwrap_or(0),
            pgid: last(&self.status.ns_pgids),
            sid: last(&self.status.ns_sids),
            exit_signal: self.stat.exit_signal,
            zombie: None,
            name: String::new(),
            body,
        })
    }

    fn body(&self, ctx: &mut Context<'_, '_>) -> Result<(Body, Host)> {
        let pid = self.frozen.pid;
        let before = self.before(ctx.watch)?;
        vdso::check(pid, &self.memory, &self.vmas, ctx.vdso)?;
        let inner = last(&self.status.ns_tgids);
        let mut instructions: Vec<u64> = before.iter().map(|t| t.cpu.regs.rip).collect();
        instructions.append(&mut ctx.beside);
        let host = Host {
            pid,
            inner_pid: inner,
            busy_signals: busy(&before),
            instructions,
        };
        let door = Door::find(host.clone(), &self.memory, &self.vmas, TABLE).about(pid, "visit")?;
        // After an error the code stays: a thread that could not be brought home is still on its way through it.
        let (mut threads, answers) = self.ask_all(&before, &door, ctx)?;
        door.close().about(pid, "visit")?;
        let (mut signals, settings, timers, mut posix_timers, inside, undo) = answers;
        posix_timers::take_pending(&mut posix_timers, &mut signals.pending);
        for thread in &mut threads {
            posix_timers::take_pending(&mut posix_timers, &mut thread.signals.pending);
        }
        let body = Body {
            threads,
            memory: match self.is_elsewhere {
                true => memory::State::elsewhere(),
                false => memory::collect(pid, &self.vmas, &self.stat, &inside, ctx.tables)?,
            },
            fds: Vec::new(),
            fs: fs::collect(pid, &self.status, ctx.maps)?,
            signals,
            timers,
            posix_timers,
            locks: Vec::new(),
            undo,
            settings,
            sharing: sharing::State::default(),
        };
        Ok((body, host))
    }

    fn before(&self, watch: &mut restart::Watch) -> Result<Vec<Before>> {
        let mut of_thread = |&tid: &Pid| {
            let status = proc::status(tid).about(tid, "status")?;
            let rseq = ptrace::rseq(tid).about(tid, "rseq")?;
            let cpu = cpu::settle(tid, &self.memory, &self.vmas, rseq, watch)?;
            Ok(Before { tid, status, rseq, cpu })
        };
        self.frozen.threads.iter().map(&mut of_thread).collect()
    }

    #[allow(clippy::type_complexity)]
    fn ask_all(
        &self,
        before: &[Before],
        door: &Door<'_>,
        ctx: &mut Context<'_, '_>,
    ) -> Result<(
        Vec<Thread>,
        (
            signals::ProcessState,
            settings::ProcessState,
            timers::State,
            Vec<posix_timers::State>,
            memory::Inside,
            Vec<ipc::semaphores::Undo>,
        ),
    )> {
        let pid = self.frozen.pid;
        let mut threads = Vec::new();
        let mut of_process = None;
        for thread in before {
            let mut batch = Batch::new();
            let asked = self.ask(&mut batch, thread, thread.tid == before[0].tid, ctx)?;
            let inner = last(&thread.status.ns_pids);
            let mut visit = door.enter(thread.tid, inner).about(thread.tid, "visit")?;
            let results = visit.run(&batch).about(thread.tid, "visit")?;
            let alone = match asked.process {
                None => None,
                Some(_) => {
                    let mut run = |batch: &Batch| visit.run(batch).about(pid, "POSIX timers");
                    let timers = posix_timers::collect(pid, self.status.cap_effective, &mut run, ctx.warnings)?;
                    let mut run = |batch: &Batch| visit.run(batch).about(pid, "memory");
                    let inside = memory::ask(&self.vmas, &mut run)?;
                    let mut run = |batch: &Batch| visit.run(batch).about(pid, "semaphores");
                    let undo = ctx.semaphores.ask(pid, &self.frozen.threads, &mut run, ctx.warnings)?;
                    Some((timers, inside, undo))
                }
            };
            visit.leave().about(thread.tid, "visit")?;
            if let (Some((signals, settings, timers)), Some((posix_timers, inside, undo))) = (asked.process, alone) {
                of_process = Some((
                    signals::answer_process(pid, signals, &results)?,
                    settings::answer_process(pid, ctx.init, &settings, &results)?,
                    timers::answer(timers, &results),
                    posix_timers,
                    inside,
                    undo,
                ));
            }
            keyrings::check(inner, &asked.keys, &results)?;
            landlock::check(inner, asked.landlock, &results)?;
            let xstate = ptrace::xstate(thread.tid).about(thread.tid, "extended registers")?;
            let stopped = ctx.frozen.is_stopped(thread.tid);
            threads.push(Thread {
                tid: inner,
                cpu: cpu::collect(&thread.cpu, (ctx.blob)(&xstate)?),
                signals: signals::answer_thread(thread.tid, asked.stack, &results, stopped)?,
                creds: creds::answer(&thread.status, ctx.maps, asked.creds, &results),
                seccomp: seccomp::collect(thread.tid, &thread.status, ctx.filters)?,
                settings: settings::answer_thread(thread.tid, thread.rseq, &asked.settings, &results)?,
                own: sharing::Own::default(),
            });
        }
        let of_process = of_process.ok_or_else(|| Error::nonsense("a process without threads"))?;
        Ok((threads, of_process))
    }

    fn ask(&self, batch: &mut Batch, thread: &Before, is_leader: bool, ctx: &mut Context<'_, '_>) -> Result<Asked> {
        let process = if is_leader {
            let signals = signals::ask_process(batch, &self.status);
            let settings = settings::ask_process(batch);
            let timers = timers::ask(batch);
            Some((signals, settings, timers))
        } else {
            None
        };
        Ok(Asked {
            process,
            stack: signals::ask_thread(batch),
            creds: creds::ask(batch),
            keys: keyrings::ask(batch),
            landlock: ctx.landlock.ask(batch, last(&thread.status.ns_pids), &thread.status)?,
            settings: settings::ask_thread(batch),
        })
    }
}

/// Signals that cannot be used as a marker: caught, blocked or pending in any thread.
fn busy(threads: &[Before]) -> u64 {
    let of_thread =
        |t: &Before| t.status.sig_caught | t.status.sig_blocked | t.status.sig_pending | t.status.shared_pending;
    threads.iter().map(of_thread).fold(0, |all, one| all | one)
}
