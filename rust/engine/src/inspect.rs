//! What an image holds, for people and programs, without restoring it.

use std::path::Path;

use serde_json::{Value, json};
use torpor_image::Reader;
use torpor_sys::PAGE_SIZE;

use crate::base;
use crate::capture::SHARED;
use crate::error::Result;
use crate::kinds::files::Object;
use crate::kinds::memory::Source;
use crate::model::{Body, Inventory, Process};

/// Header, spec and container record.
pub fn peek(path: &Path) -> Result<Value> {
    let image = Reader::open(path)?;
    Ok(json!({
        "header": image.header(),
        "spec": image.section::<Value>("spec")?,
        "container": image.section::<Value>("container")?,
    }))
}

/// Everything but the pages: process tree, memory by kind, open files, sizes.
pub fn inspect(path: &Path) -> Result<Value> {
    let image = Reader::open(path)?;
    let memory_only = base::is_memory_only(&image);
    let inventory: Inventory = if memory_only {
        Inventory::default()
    } else {
        image.section("metadata")?
    };
    let pages_of = |space: u32| image.runs_of(space).iter().map(|r| r.pages).sum::<u64>();
    let processes: Vec<Value> = inventory
        .processes
        .iter()
        .enumerate()
        .map(|(index, p)| process(p, &inventory, pages_of(index as u32) * PAGE_SIZE))
        .collect();
    let shared: Vec<Value> = inventory
        .objects
        .shared
        .iter()
        .enumerate()
        .map(|(index, s)| json!({"object": s.kind, "size": s.size, "stored": pages_of(SHARED + index as u32) * PAGE_SIZE}))
        .collect();
    let sections: Vec<Value> = image
        .sections()
        .map(|s| json!({"name": s.name, "bytes": s.len}))
        .collect();
    let chain: Vec<Value> = image
        .chain()
        .map(|m| {
            json!({
                "path": m.path(), "bytes": m.bytes(), "data_bytes": m.data_bytes(), "compression": m.compression(),
                "digest": m.digest(), "uuid": m.header().uuid,
            })
        })
        .collect();
    Ok(json!({
        "path": image.path(),
        "bytes": image.len(),
        "digest": image.digest(),
        "compression": chain[0]["compression"],
        "parent": image.header().parent,
        "chain": chain,
        "header": image.header(),
        "sections": sections,
        "container": image.section::<Value>("container")?,
        "memory_only": memory_only,
        "tasks": inventory.tasks(),
        "inherited_bytes": image.runs().iter().filter(|r| r.link() > 0).map(|r| r.bytes()).sum::<u64>(),
        "memory_bytes": image.runs().iter().map(|r| r.bytes()).sum::<u64>(),
        "processes": processes,
        "shared": shared,
        "pipes": inventory.objects.pipes.iter().map(|p| json!({"ino": p.ino, "bytes": p.content.len})).collect::<Vec<_>>(),
        "warnings": inventory.warnings,
    }))
}

fn process(process: &Process, inventory: &Inventory, stored: u64) -> Value {
    let mut value = json!({
        "pid": process.pid, "ppid": process.ppid, "pgid": process.pgid, "sid": process.sid,
        "zombie": process.zombie, "name": process.name,
    });
    let Some(body) = &process.body else { return value };
    let threads: Vec<Value> = body
        .threads
        .iter()
        .map(|t| json!({"tid": t.tid, "name": t.settings.name}))
        .collect();
    let files: Vec<Value> = body
        .fds
        .iter()
        .map(|d| json!({"fd": d.fd, "file": name(&inventory.descriptions[d.description].object, inventory)}))
        .collect();
    value["name"] = json!(body.threads[0].settings.name);
    value["exe"] = json!(source_name(inventory.memory_of(body).exe, inventory));
    value["cwd"] = json!(body.fs.cwd);
    value["uid"] = json!(body.threads[0].creds.uids[0]);
    value["threads"] = json!(threads);
    value["stored_bytes"] = json!(stored);
    value["memory"] = memory(body);
    value["files"] = json!(files);
    if !body.sharing.is_nothing() {
        value["sharing"] = json!(body.sharing);
    }
    value
}

/// Address space by kind, in bytes.
fn memory(body: &Body) -> Value {
    let sum = |fits: &dyn Fn(Source, bool) -> bool| -> u64 {
        let areas = body.memory.areas.iter().filter(|a| fits(a.source, a.is_private()));
        areas.map(|a| a.end - a.start).sum()
    };
    json!({
        "private_anonymous": sum(&|s, p| s == Source::Nothing && p),
        "private_file": sum(&|s, p| matches!(s, Source::File(_)) && p),
        "shared_file": sum(&|s, p| matches!(s, Source::File(_)) && !p),
        "shared_object": sum(&|s, _| matches!(s, Source::Shared(_))),
        "areas": body.memory.areas.len(),
    })
}

fn source_name(source: Source, inventory: &Inventory) -> String {
    match source {
        Source::Nothing => String::new(),
        Source::File(i) => inventory
            .objects
            .mapped
            .get(i)
            .map(|m| m.path.clone())
            .unwrap_or_default(),
        Source::Shared(i) => format!("shared object {i}"),
    }
}

fn name(object: &Object, inventory: &Inventory) -> String {
    match object {
        Object::Stdio { index } => format!("standard stream {index}"),
        Object::Path(state) => state.path.clone(),
        Object::Shared { index } => format!("shared object {index}"),
        Object::Pipe { index } => {
            format!("pipe {}", inventory.objects.pipes.get(*index).map_or(0, |p| p.ino))
        }
        Object::Eventfd(state) => format!("eventfd, count {}", state.count),
        Object::Epoll(state) => format!("epoll, {} watched", state.watches.len()),
        Object::Timerfd(_) => "timerfd".into(),
        Object::Signalfd(_) => "signalfd".into(),
        Object::Inotify(state) => format!("inotify, {} watched", state.watches.len()),
        Object::Pidfd(state) => format!("pidfd of {}", state.pid),
        Object::Unix(_) => "unix socket".into(),
        Object::Pty(_) => "terminal".into(),
        Object::Inet(_) => "internet socket".into(),
    }
}
