//! What tasks have in common, or have of their own where threads have it in common: descriptor tables, what path look-ups
//! begin with, memory, signal actions (CLONE_FILES, CLONE_FS, CLONE_VM and CLONE_SIGHAND of clone(2), unshare(2)).
//!
//! Nothing but a birth gives a task what another one has. So every process is made by its parent with the flags that its
//! place in the tree asks for: each group of processes with something in common is reached from one ancestor, and whoever on
//! the way does not belong to it gives it up (unshare(2)) when its children are there. Nothing is in it by then. Memory
//! and signal actions cannot be given up this way: those who have them in common are children of each other.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use torpor_sys::Pid;
use torpor_sys::kcmp::{self, Kind};
use torpor_sys::remote::Batch;

use super::{files, fs, locks};
use crate::build::Lineage;
use crate::error::{About, Error, Result};
use crate::model::{Body, Inventory, Process};

/// With whom a process has something in common: an earlier one of the image, which holds it for all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The descriptor table, and with it the locks of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<i32>,
    /// Root, working directory and umask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs: Option<i32>,
    /// The address space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<i32>,
    /// Signal actions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actions: Option<i32>,
}

impl State {
    /// Whether there is nothing.
    pub fn is_nothing(&self) -> bool {
        *self == State::default()
    }

    fn of(&self, kind: Kind) -> Option<i32> {
        match kind {
            Kind::Files => self.files,
            Kind::Fs => self.fs,
            Kind::Vm => self.memory,
            Kind::Sighand => self.actions,
            Kind::File | Kind::SysvSem => None,
        }
    }
}

/// What a thread has of its own, although its process has it too.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Own {
    /// A descriptor table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<files::Descriptor>>,
    /// The locks that belong to that table.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locks: Vec<locks::Posix>,
    /// Root, working directory and umask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs: Option<fs::State>,
}

impl Own {
    /// Whether there is nothing.
    pub fn is_nothing(&self) -> bool {
        self.fds.is_none() && self.fs.is_none()
    }
}

/// What can be in common: how kcmp(2) and clone(2) call it, and what to call it.
const KINDS: [(Kind, i32, &str); 4] = [
    (Kind::Files, libc::CLONE_FILES, "descriptor table"),
    (Kind::Fs, libc::CLONE_FS, "working directory (CLONE_FS)"),
    (Kind::Vm, libc::CLONE_VM, "address space"),
    (Kind::Sighand, libc::CLONE_SIGHAND, "signal handlers"),
];

/// What a task can give up, and a thread can have of its own.
const GIVEN_UP: i32 = libc::CLONE_FILES | libc::CLONE_FS;

/// Who holds what for whom.
#[derive(Debug, Default)]
pub struct Survey {
    /// By process: the first that has the same.
    holders: [BTreeMap<Pid, Pid>; 4],
    /// Threads that have one of their own.
    apart: [BTreeSet<Pid>; 4],
}

fn place(kind: Kind) -> usize {
    KINDS.iter().position(|k| k.0 == kind).unwrap_or(0)
}

/// Those of `tasks`, in their order, that share one, by the kernel's order of what they have.
fn groups(tasks: &[Pid], kind: Kind) -> Result<Vec<Vec<Pid>>> {
    let mut sorted: Vec<(usize, Pid)> = tasks.iter().copied().enumerate().collect();
    let mut failed = None;
    sorted.sort_by(|a, b| {
        kcmp::order(a.1, b.1, kind, 0, 0).unwrap_or_else(|e| {
            failed = Some(e);
            std::cmp::Ordering::Equal
        })
    });
    if let Some(e) = failed {
        return Err(e).about(tasks[0], "kcmp");
    }
    let mut all: Vec<Vec<(usize, Pid)>> = Vec::new();
    for task in sorted {
        match all.last_mut() {
            Some(group) if kcmp::same(group[0].1, task.1, kind).about(task.1, "kcmp")? => group.push(task),
            _ => all.push(vec![task]),
        }
    }
    let in_order = |mut group: Vec<(usize, Pid)>| {
        group.sort_unstable();
        group.into_iter().map(|(_, pid)| pid).collect()
    };
    Ok(all.into_iter().map(in_order).collect())
}

impl Survey {
    /// Looks at processes and their threads, the main thread first; parents before their children.
    ///
    /// # Errors
    /// Refused: what threads have apart from their process and yet in common.
    pub fn of(processes: &[(Pid, &[Pid])]) -> Result<Survey> {
        let pids: Vec<Pid> = processes.iter().map(|(pid, _)| *pid).collect();
        let mut survey = Survey::default();
        for (kind, flag, name) in KINDS {
            let mut tasks = pids.clone();
            let apart = &mut survey.apart[place(kind)];
            for (pid, threads) in processes.iter().filter(|_| flag & GIVEN_UP != 0) {
                for &tid in threads.iter().skip(1) {
                    if !kcmp::same(*pid, tid, kind).about(tid, "kcmp")? {
                        apart.insert(tid);
                        tasks.push(tid);
                    }
                }
            }
            for group in groups(&tasks, kind)?.iter().filter(|g| g.len() > 1) {
                if let Some(tid) = group.iter().find(|t| apart.contains(t)) {
                    let other = group.iter().find(|t| *t != tid).unwrap_or(tid);
                    let why = format!("it has one that its process has not, but task {other} has: not carried");
                    return Err(Error::unsupported(*tid, name, why, "end one of them"));
                }
                let members = group.iter().skip(1);
                survey.holders[place(kind)].extend(members.map(|pid| (*pid, group[0])));
            }
        }
        Ok(survey)
    }

    /// Who holds what a process has: another one, or itself.
    pub fn holder(&self, kind: Kind, pid: Pid) -> Pid {
        self.holders[place(kind)].get(&pid).copied().unwrap_or(pid)
    }

    /// Whether a thread has one of its own.
    pub fn is_apart(&self, kind: Kind, tid: Pid) -> bool {
        self.apart[place(kind)].contains(&tid)
    }

    /// What is in the image of a process; `inner` is the container's name for one.
    pub fn state(&self, pid: Pid, inner: impl Fn(Pid) -> Option<i32>) -> State {
        let other = |kind| Some(self.holder(kind, pid)).filter(|h| *h != pid).and_then(&inner);
        State {
            files: other(Kind::Files),
            fs: other(Kind::Fs),
            memory: other(Kind::Vm),
            actions: other(Kind::Sighand),
        }
    }
}

/// By which group an edge of the tree is used, of each kind; the group by its holder.
type Edge = [Option<i32>; 4];

/// How processes are made, so that they have in common what they had.
#[derive(Debug, Default)]
pub struct Births {
    edges: BTreeMap<i32, Edge>,
    early: BTreeSet<i32>,
}

/// One step of a parent.
#[derive(Debug)]
pub enum Step<'p> {
    /// Give up what is in common (unshare(2), these flags).
    GiveUp(i32),
    /// Make this child with these flags of clone(2).
    Make(&'p Process, i32),
}

impl Step<'_> {
    /// Adds the giving up to a batch.
    pub fn give_up(batch: &mut Batch, flags: i32) {
        batch.must("unshare", libc::SYS_unshare, [flags.into()]);
    }
}

impl Births {
    /// Finds out.
    ///
    /// # Errors
    /// Refused: what cannot have come about by clone(2) and unshare(2) from parent to child.
    pub fn plan(inventory: &Inventory, lineage: &Lineage) -> Result<Births> {
        let mut births = Births {
            early: lineage.early.clone(),
            ..Births::default()
        };
        let parents: BTreeMap<i32, i32> = inventory.processes.iter().map(|p| (p.pid, p.ppid)).collect();
        for (kind, _, name) in KINDS {
            let mut groups: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
            for (pid, body) in living(inventory) {
                if let Some(holder) = body.sharing.of(kind) {
                    groups.entry(holder).or_insert_with(|| vec![holder]).push(pid);
                }
            }
            for (holder, members) in groups {
                for child in edges(&members, &parents) {
                    let edge = births.edges.entry(child).or_default();
                    let used = edge[place(kind)].replace(holder);
                    if used.is_some_and(|by| by != holder) || lineage.orphans.contains(&child) {
                        return Err(apart(members[1], name, holder));
                    }
                }
            }
        }
        for process in &inventory.processes {
            let mut children = children_of(inventory, process.pid);
            children.retain(|c| !lineage.orphans.contains(&c.pid));
            births.steps(process, &children)?;
        }
        Ok(births)
    }

    fn edge(&self, pid: i32) -> Edge {
        self.edges.get(&pid).copied().unwrap_or_default()
    }

    /// What a parent does to make `children`, in an order that gives each what it is to have, those first that come before
    /// a session. At the end it has nothing in common but what it is to have.
    ///
    /// # Errors
    /// Refused, as above.
    pub fn steps<'p>(&self, parent: &Process, children: &[&'p Process]) -> Result<Vec<Step<'p>>> {
        let own = KINDS.map(|(kind, ..)| self.group(parent, kind));
        let mut now = self.edge(parent.pid);
        let mut left: [BTreeSet<i32>; 4] = Default::default();
        let rank = |child: &&Process| {
            let edge = self.edge(child.pid);
            [0, 1, 2, 3].map(|k| match edge[k] {
                None => (0, 0),
                of if of == now[k] && of != own[k] => (0, 0),
                of if of == own[k] => (2, 0),
                Some(of) => (1, of),
            })
        };
        let mut order = children.to_vec();
        order.sort_by_key(|child| (!self.early.contains(&child.pid), rank(child)));
        let mut steps = Vec::new();
        for child in order {
            let edge = self.edge(child.pid);
            let mut flags = 0;
            for (k, (_, flag, name)) in KINDS.into_iter().enumerate() {
                let Some(group) = edge[k] else { continue };
                if now[k] != Some(group) {
                    if let Some(before) = now[k] {
                        left[k].insert(before);
                        steps.push(Step::GiveUp(flag));
                    }
                    if left[k].contains(&group) || flag & GIVEN_UP == 0 && now[k].is_some() {
                        return Err(apart(child.pid, name, group));
                    }
                    now[k] = Some(group);
                }
                flags |= flag;
            }
            if flags & libc::CLONE_SIGHAND != 0 && flags & libc::CLONE_VM == 0 {
                let what = format!("process {} shares signal actions and no memory", child.pid);
                return Err(Error::nonsense(what));
            }
            steps.push(Step::Make(child, flags));
        }
        for (k, (_, flag, name)) in KINDS.into_iter().enumerate() {
            if let Some(last) = now[k].filter(|last| own[k] != Some(*last)) {
                if own[k].is_some() || flag & GIVEN_UP == 0 {
                    return Err(apart(parent.pid, name, last));
                }
                steps.push(Step::GiveUp(flag));
            }
            if now[k].is_none() && own[k].is_some() {
                return Err(apart(parent.pid, name, parent.pid));
            }
        }
        Ok(steps)
    }

    /// The group that a process belongs to: it is a member, or a holder that an edge beside it knows.
    fn group(&self, process: &Process, kind: Kind) -> Option<i32> {
        let body = process.body.as_ref()?;
        let holds = || self.edges.values().any(|edge| edge[place(kind)] == Some(process.pid));
        body.sharing.of(kind).or_else(|| holds().then_some(process.pid))
    }
}

/// Refused: it shares with one that is neither above nor below nor beside it in the tree.
fn apart(pid: i32, name: &str, with: i32) -> Error {
    let why = format!(
        "it shares its {name} with process {with}, but their places in the tree do not let one be born with it"
    );
    Error::unsupported(pid, name, why, "")
}

fn living(inventory: &Inventory) -> impl Iterator<Item = (i32, &Body)> {
    inventory
        .processes
        .iter()
        .filter_map(|p| Some((p.pid, p.body.as_ref()?)))
}

fn children_of(inventory: &Inventory, pid: i32) -> Vec<&Process> {
    inventory.processes.iter().skip(1).filter(|p| p.ppid == pid).collect()
}

/// The edges, each named by its child, that connect processes in a tree.
fn edges(members: &[i32], parents: &BTreeMap<i32, i32>) -> BTreeSet<i32> {
    let path = |pid: &i32| {
        let mut path = vec![*pid];
        while let Some(parent) = path.last().and_then(|p| parents.get(p)).filter(|p| **p != 0) {
            path.push(*parent);
            if path.len() > parents.len() {
                break;
            }
        }
        path.reverse();
        path
    };
    let paths: Vec<Vec<i32>> = members.iter().map(path).collect();
    let common = (0..)
        .take_while(|at| {
            paths
                .iter()
                .all(|p| p.get(*at).is_some() && p.get(*at) == paths[0].get(*at))
        })
        .count();
    paths
        .iter()
        .flat_map(|p| p[common.min(p.len())..].iter().copied())
        .collect()
}

/// # Errors
/// An image that contradicts itself, or refused as [`Births::plan`] does.
pub fn plan(inventory: &Inventory, lineage: &Lineage) -> Result<()> {
    let mut holders: BTreeMap<i32, &State> = BTreeMap::new();
    for (pid, body) in living(inventory) {
        for (kind, ..) in KINDS {
            let holder = body.sharing.of(kind);
            if holder.is_some_and(|h| holders.get(&h).is_none_or(|state| state.of(kind).is_some())) {
                return Err(Error::nonsense(format!(
                    "process {pid} shares with one that holds nothing"
                )));
            }
        }
        if body.sharing.files.is_some() && !(body.fds.is_empty() && body.locks.is_empty()) {
            return Err(Error::nonsense(format!("process {pid} has two descriptor tables")));
        }
        let has_memory = !(body.memory.areas.is_empty() && body.memory.kernel.is_empty());
        if body.sharing.memory.is_some() && has_memory {
            return Err(Error::nonsense(format!("process {pid} has two address spaces")));
        }
        if body.threads.first().is_some_and(|t| !t.own.is_nothing()) {
            return Err(Error::nonsense(format!(
                "the main thread of {pid} is apart from its process"
            )));
        }
        holders.insert(pid, &body.sharing);
    }
    Births::plan(inventory, lineage).map(drop)
}

/// Whether any process has its memory from another one.
pub fn is_memory_shared(inventory: &Inventory) -> bool {
    living(inventory).any(|(_, body)| body.sharing.memory.is_some())
}

/// Flags that a thread is made without, since it has of its own what they would give it.
pub fn thread_flags(own: &Own) -> i32 {
    let flag = |has: bool, flag| if has { flag } else { 0 };
    flag(own.fds.is_some(), libc::CLONE_FILES) | flag(own.fs.is_some(), libc::CLONE_FS)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn process(pid: i32, ppid: i32, sharing: State) -> Process {
        let body = serde_json::json!({
            "threads": [], "fds": [], "sharing": sharing,
            "memory": {"areas": [], "kernel": [], "map": vec![0; 11], "auxv": [], "exe": "nothing"},
            "fs": {"cwd": "/", "root": "/", "umask": 0},
            "signals": {"actions": [], "pending": []},
            "timers": {"interval": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]},
            "settings": {
                "limits": vec![(0, 0); 16], "dumpable": 1, "subreaper": 0, "no_huge_pages": 0,
                "oom_score_adj": 0, "coredump_filter": "0", "personality": "0",
            },
        });
        Process {
            ppid,
            body: Some(serde_json::from_value(body).unwrap()),
            ..Process::without_body(pid)
        }
    }

    fn files(pid: i32) -> State {
        State {
            files: Some(pid),
            ..State::default()
        }
    }

    fn tree(all: Vec<Process>) -> Inventory {
        Inventory {
            processes: all,
            ..Inventory::default()
        }
    }

    fn shown(inventory: &Inventory, pid: i32) -> Vec<String> {
        let births = Births::plan(inventory, &Lineage::of(inventory)).unwrap();
        let parent = inventory.processes.iter().find(|p| p.pid == pid).unwrap();
        let steps = births.steps(parent, &children_of(inventory, pid)).unwrap();
        let text = |step: &Step<'_>| match step {
            Step::GiveUp(flags) => format!("unshare {flags:x}"),
            Step::Make(child, flags) => format!("{} {flags:x}", child.pid),
        };
        steps.iter().map(text).collect()
    }

    #[test]
    fn a_child_is_born_with_what_its_parent_has() {
        let none = State::default();
        let all = tree(vec![process(1, 0, none), process(2, 1, none), process(3, 1, files(1))]);
        assert_eq!(shown(&all, 1), ["2 0", "3 400"]);
    }

    #[test]
    fn who_is_between_gives_it_up() {
        let none = State::default();
        let all = tree(vec![process(1, 0, none), process(2, 1, none), process(3, 2, files(1))]);
        assert_eq!(shown(&all, 1), ["2 400"]);
        assert_eq!(shown(&all, 2), ["3 400", "unshare 400"]);
    }

    #[test]
    fn siblings_share_what_their_parent_gives_up() {
        let none = State::default();
        let all = tree(vec![
            process(1, 0, none),
            process(2, 1, none),
            process(3, 1, none),
            process(4, 1, files(2)),
            process(5, 1, files(3)),
            process(6, 1, files(1)),
        ]);
        let steps = [
            "2 400",
            "4 400",
            "unshare 400",
            "3 400",
            "5 400",
            "unshare 400",
            "6 400",
        ];
        assert_eq!(shown(&all, 1), steps);
    }

    #[test]
    fn what_no_birth_can_give_is_refused() {
        let none = State::default();
        // 3 has what 1 has, and 4 what 2 has, which is between 1 and 3.
        let all = tree(vec![
            process(1, 0, none),
            process(2, 1, none),
            process(3, 2, files(1)),
            process(4, 1, files(2)),
        ]);
        let error = Births::plan(&all, &Lineage::of(&all)).unwrap_err();
        assert!(error.to_string().contains("their places in the tree"), "{error}");
        let lineage = Lineage {
            orphans: BTreeSet::from([2]),
            ..Lineage::default()
        };
        let all = tree(vec![process(1, 0, none), process(2, 1, files(1))]);
        assert!(Births::plan(&all, &lineage).is_err());
    }

    #[test]
    fn memory_is_given_to_children_of_who_has_it() {
        let none = State::default();
        let memory = |actions| State {
            memory: Some(1),
            actions,
            ..none
        };
        let all = tree(vec![
            process(1, 0, none),
            process(2, 1, memory(None)),
            process(3, 1, memory(Some(1))),
            process(4, 2, memory(None)),
            process(5, 2, none),
        ]);
        assert_eq!(shown(&all, 1), ["2 100", "3 900"]);
        assert_eq!(shown(&all, 2), ["5 0", "4 100"]);
        let between = tree(vec![
            process(1, 0, none),
            process(2, 1, none),
            process(3, 2, memory(None)),
        ]);
        let error = Births::plan(&between, &Lineage::of(&between)).unwrap_err();
        assert!(error.to_string().contains("address space"), "{error}");
        let actions = State {
            actions: Some(1),
            ..none
        };
        let alone = tree(vec![process(1, 0, none), process(2, 1, actions)]);
        assert!(matches!(
            plan(&alone, &Lineage::of(&alone)),
            Err(Error::Nonsense { .. })
        ));
    }

    #[test]
    fn an_image_that_shares_with_nobody_is_nonsense() {
        let all = tree(vec![process(1, 0, files(7))]);
        assert!(matches!(plan(&all, &Lineage::of(&all)), Err(Error::Nonsense { .. })));
    }
}
