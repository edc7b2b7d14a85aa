//! Who a thread acts as: ids, groups, capabilities, securebits, no_new_privs. Kept in the container's own ids.

use serde::{Deserialize, Serialize};
use torpor_sys::Pid;
use torpor_sys::proc::{self, Status};
use torpor_sys::remote::{Batch, Results};

use crate::bounds::Bounds;
use crate::error::{About, Error, Result};

const CAP_SETPCAP: u64 = 8;
/// Set by PR_SET_KEEPCAPS too, which needs no capability (capabilities(7)).
const SECBIT_KEEP_CAPS: u64 = 1 << 4;

/// The credentials of a thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Real, effective, saved, file system.
    pub uids: [u32; 4],
    /// The same of the group.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capability sets as bit masks: inheritable, permitted, effective, bounding, ambient.
    pub caps: [u64; 5],
    /// prctl(2) PR_GET_SECUREBITS.
    pub securebits: u64,
    /// Cannot gain privileges by execve any more.
    pub no_new_privs: bool,
}

/// The id maps of a container's user namespace: (inside, outside, count).
#[derive(Debug, Clone, Default)]
pub struct IdMaps {
    /// Of users.
    pub uids: Vec<(u32, u32, u32)>,
    /// Of groups.
    pub gids: Vec<(u32, u32, u32)>,
}

impl IdMaps {
    /// Those of the user namespace of a process.
    pub fn of(pid: Pid) -> Result<IdMaps> {
        Ok(IdMaps {
            uids: proc::id_map(pid, "uid_map").about(pid, "uid_map")?,
            gids: proc::id_map(pid, "gid_map").about(pid, "gid_map")?,
        })
    }

    /// Mode, user and group, the latter two as the container numbers them.
    pub fn inner_owner(&self, (mode, uid, gid): (u32, u32, u32)) -> (u32, u32, u32) {
        let (uid, gid) = self.inner(uid, gid);
        (mode, uid, gid)
    }

    /// Mode, user and group, the latter two as we number them.
    pub fn outer_owner(&self, (mode, uid, gid): (u32, u32, u32)) -> (u32, u32, u32) {
        (mode, outside(&self.uids, uid), outside(&self.gids, gid))
    }

    /// A user and a group as the container numbers them.
    pub fn inner(&self, uid: u32, gid: u32) -> (u32, u32) {
        (inside(&self.uids, uid), inside(&self.gids, gid))
    }
}

fn inside(map: &[(u32, u32, u32)], id: u32) -> u32 {
    let find = |&&(_, outside, count): &&(u32, u32, u32)| id.wrapping_sub(outside) < count;
    map.iter()
        .find(find)
        .map_or(65534, |&(inside, outside, _)| inside + (id - outside))
}

/// An id that the container does not have stays what it is: the kernel shows nobody's (65534).
fn outside(map: &[(u32, u32, u32)], id: u32) -> u32 {
    let find = |&&(inside, _, count): &&(u32, u32, u32)| id.wrapping_sub(inside) < count;
    map.iter()
        .find(find)
        .map_or(id, |&(inside, outside, _)| outside + (id - inside))
}

/// Asks for what /proc does not tell: the securebits.
pub fn ask(batch: &mut Batch) -> usize {
    batch.must("PR_GET_SECUREBITS", libc::SYS_prctl, [libc::PR_GET_SECUREBITS.into()])
}

/// The credentials of a thread.
pub fn answer(status: &Status, maps: &IdMaps, asked: usize, results: &Results) -> State {
    State {
        uids: status.uids.map(|id| inside(&maps.uids, id)),
        gids: status.gids.map(|id| inside(&maps.gids, id)),
        groups: status.groups.iter().map(|id| inside(&maps.gids, *id)).collect(),
        caps: [
            status.cap_inheritable,
            status.cap_permitted,
            status.cap_effective,
            status.cap_bounding,
            status.cap_ambient,
        ],
        securebits: results.raw(asked) as u64,
        no_new_privs: status.no_new_privs,
    }
}

/// # Errors
/// Refused when the image wants more than the new container's spec grants.
pub fn plan(pid: i32, state: &State, bounds: &Bounds) -> Result<()> {
    let names = ["inheritable", "permitted", "effective", "bounding", "ambient"];
    for (name, caps) in names.iter().zip(state.caps) {
        let most = match *name {
            "inheritable" | "bounding" => bounds.bounding,
            _ => bounds.capabilities,
        };
        if caps & !most != 0 {
            let extra = caps & !most;
            let why = format!("the image asks for {name} capabilities {extra:#x} that the container does not grant");
            return Err(Error::refused(pid, "capabilities", why));
        }
    }
    if bounds.no_new_privs && !state.no_new_privs {
        let why = "the container sets it, the image does not";
        return Err(Error::refused(pid, "no_new_privs", why));
    }
    if state.securebits != 0 && !bounds.grants(CAP_SETPCAP) && state.securebits != SECBIT_KEEP_CAPS {
        let why = format!("the image sets {:#x}, which needs CAP_SETPCAP", state.securebits);
        return Err(Error::refused(pid, "securebits", why));
    }
    plan_ids(pid, state, bounds)
}

fn plan_ids(pid: i32, state: &State, bounds: &Bounds) -> Result<()> {
    if let Some(uid) = bounds.only_uid
        && let Some(other) = state.uids.iter().find(|u| **u != uid)
    {
        let why = format!("the image acts as user {other}, the container runs as user {uid} without CAP_SETUID");
        return Err(Error::refused(pid, "uid", why));
    }
    if let Some(gids) = &bounds.only_gids
        && let Some(other) = state.gids.iter().chain(&state.groups).find(|g| !gids.contains(g))
    {
        let why = format!("the image acts as group {other}, which the container does not grant without CAP_SETGID");
        return Err(Error::refused(pid, "gid", why));
    }
    Ok(())
}

/// What follows in the batch is judged as if a program of the container did it, with all that the spec grants.
/// `have` are the capabilities to come back to ([`act_as_before`]).
pub fn act_within(batch: &mut Batch, bounds: &Bounds, have: u64) {
    if let Some(gids) = &bounds.only_gids {
        set_groups(batch, gids);
        batch.may(
            "setfsgid",
            libc::SYS_setfsgid,
            [gids.first().copied().unwrap_or(0).into()],
        );
    }
    if let Some(uid) = bounds.only_uid {
        batch.may("setfsuid", libc::SYS_setfsuid, [uid.into()]);
    }
    capset(batch, [have & bounds.capabilities, have, 0]);
}

/// The end of [`act_within`].
pub fn act_as_before(batch: &mut Batch, have: u64) {
    capset(batch, [have, have, 0]);
    batch.may("setfsuid", libc::SYS_setfsuid, [0.into()]);
    batch.may("setfsgid", libc::SYS_setfsgid, [0.into()]);
}

/// Sets everything, for one thread, by raw calls. The order is forced: the bounding set and the securebits need
/// CAP_SETPCAP; ambient capabilities must be permitted and inheritable; changing ids drops capabilities unless
/// SECBIT_NO_SETUID_FIXUP says otherwise (capabilities(7)).
pub fn rebuild(batch: &mut Batch, state: &State, have: u64) {
    const SECBIT_NO_SETUID_FIXUP: u64 = 1 << 2;
    let [inheritable, permitted, effective, bounding, ambient] = state.caps;
    let prctl = libc::SYS_prctl;
    batch.must(
        "PR_SET_SECUREBITS",
        prctl,
        [libc::PR_SET_SECUREBITS.into(), SECBIT_NO_SETUID_FIXUP.into()],
    );
    for cap in (0..64u64).filter(|c| have >> c & 1 == 1 && bounding >> c & 1 == 0) {
        batch.must("PR_CAPBSET_DROP", prctl, [libc::PR_CAPBSET_DROP.into(), cap.into()]);
    }
    ids(batch, state);
    capset(batch, [have, have, inheritable]);
    batch.must(
        "PR_CAP_AMBIENT",
        prctl,
        [libc::PR_CAP_AMBIENT.into(), libc::PR_CAP_AMBIENT_CLEAR_ALL.into()],
    );
    for cap in (0..64u64).filter(|c| ambient >> c & 1 == 1) {
        let raise = libc::PR_CAP_AMBIENT_RAISE;
        batch.must(
            "PR_CAP_AMBIENT_RAISE",
            prctl,
            [libc::PR_CAP_AMBIENT.into(), raise.into(), cap.into()],
        );
    }
    batch.must(
        "PR_SET_SECUREBITS",
        prctl,
        [libc::PR_SET_SECUREBITS.into(), state.securebits.into()],
    );
    capset(batch, [effective, permitted, inheritable]);
    if state.no_new_privs {
        batch.must(
            "PR_SET_NO_NEW_PRIVS",
            prctl,
            [libc::PR_SET_NO_NEW_PRIVS.into(), 1.into()],
        );
    }
}

/// Makes a process one without any power that others of the same user and group may look at.
pub fn become_plain(batch: &mut Batch, uid: u32, gid: u32) {
    set_groups(batch, &[]);
    batch.must("setresgid", libc::SYS_setresgid, [gid.into(), gid.into(), gid.into()]);
    batch.must("setresuid", libc::SYS_setresuid, [uid.into(), uid.into(), uid.into()]);
    capset(batch, [0, 0, 0]);
    batch.must(
        "PR_SET_DUMPABLE",
        libc::SYS_prctl,
        [libc::PR_SET_DUMPABLE.into(), 1.into()],
    );
}

fn ids(batch: &mut Batch, state: &State) {
    set_groups(batch, &state.groups);
    let [r, e, s, f] = state.gids;
    batch.must("setresgid", libc::SYS_setresgid, [r.into(), e.into(), s.into()]);
    batch.may("setfsgid", libc::SYS_setfsgid, [f.into()]);
    let [r, e, s, f] = state.uids;
    batch.must("setresuid", libc::SYS_setresuid, [r.into(), e.into(), s.into()]);
    batch.may("setfsuid", libc::SYS_setfsuid, [f.into()]);
}

fn set_groups(batch: &mut Batch, groups: &[u32]) {
    let bytes: Vec<u8> = groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    let list = batch.data(&bytes);
    // A user namespace may forbid it (setgroups "deny"); then the groups are what they always were.
    batch.may("setgroups", libc::SYS_setgroups, [groups.len().into(), list.into()]);
}

/// `[effective, permitted, inheritable]` by capset(2), version 3: two words of 32 bits each.
fn capset(batch: &mut Batch, sets: [u64; 3]) {
    const VERSION_3: u64 = 0x2008_0522;
    let header = batch.data(&VERSION_3.to_le_bytes());
    let mut bytes = Vec::new();
    for half in [0, 32] {
        for set in sets {
            bytes.extend_from_slice(&((set >> half) as u32).to_le_bytes());
        }
    }
    let data = batch.data(&bytes);
    batch.must("capset", libc::SYS_capset, [header.into(), data.into()]);
}
