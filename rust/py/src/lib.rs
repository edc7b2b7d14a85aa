//! `torpor._core`: few coarse calls from Python into the engine, JSON in and out. No logic lives here.

mod errors;
mod tracer;

use std::path::Path;
use std::time::Duration;

use pyo3::prelude::*;
use torpor_engine::error::About;
use torpor_image::Reader;
use torpor_sys::cgroup::Freezer;

use errors::Failure;

/// The module.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::{
        build_info, checkpoint, inspect, is_frozen, peek, probe, put_right, restore, set_frozen, squash, verify,
    };
}

/// Which build this is.
#[pyfunction]
fn build_info() -> String {
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    serde_json::json!({"version": env!("CARGO_PKG_VERSION"), "profile": profile, "rustc": env!("CARGO_PKG_RUST_VERSION")})
        .to_string()
}

/// What this kernel and our rights allow.
#[pyfunction]
fn probe(py: Python<'_>) -> String {
    let table = py.detach(torpor_sys::probe::all);
    let json: serde_json::Map<String, serde_json::Value> = table
        .into_iter()
        .map(|(name, a)| (name.into(), serde_json::json!({"ok": a.ok, "how": a.how})))
        .collect();
    serde_json::Value::Object(json).to_string()
}

/// Saves a container. The work is done by a process of its own, which undoes it when this one is killed.
/// `on_progress` is called with the stage, the bytes that are done in it and those in all.
#[pyfunction]
#[pyo3(signature = (request, on_progress=None))]
fn checkpoint(py: Python<'_>, request: &str, on_progress: Option<Py<PyAny>>) -> PyResult<String> {
    tracer::checkpoint(py, request, on_progress.as_ref())
}

/// Puts right what the killed tracer of a detached checkpoint has left in the container whose init is `pid`.
#[pyfunction]
fn put_right(py: Python<'_>, pid: i32) {
    py.detach(|| tracer::put_right(pid));
}

/// Restores an image into a waiting container. `on_loaded` is called when all is there and nothing runs yet.
/// `on_progress` as in `checkpoint`.
#[pyfunction]
#[pyo3(signature = (request, on_loaded, on_progress=None))]
fn restore(py: Python<'_>, request: &str, on_loaded: Py<PyAny>, on_progress: Option<Py<PyAny>>) -> PyResult<String> {
    tracer::restore(py, request, &on_loaded, on_progress.as_ref())
}

/// What an image holds, as JSON.
#[pyfunction]
fn inspect(py: Python<'_>, path: &str) -> PyResult<String> {
    let result = py.detach(|| torpor_engine::inspect::inspect(Path::new(path)));
    result.map(|v| v.to_string()).map_err(|e| Failure::from(e).raise(py))
}

/// Header, spec and container record of an image, without reading the rest.
#[pyfunction]
fn peek(py: Python<'_>, path: &str) -> PyResult<String> {
    let result = py.detach(|| torpor_engine::inspect::peek(Path::new(path)));
    result.map(|v| v.to_string()).map_err(|e| Failure::from(e).raise(py))
}

/// Reads every byte of an image and checks it.
#[pyfunction]
fn verify(py: Python<'_>, path: &str) -> PyResult<()> {
    let result = py.detach(|| Reader::open(Path::new(path)).and_then(|image| image.verify()));
    result.map_err(|e| Failure::from(torpor_engine::Error::from(e)).raise(py))
}

/// Folds a chain of images into one.
#[pyfunction]
fn squash(py: Python<'_>, request: &str) -> PyResult<String> {
    let request = tracer::parse(py, request)?;
    let result = py.detach(|| torpor_engine::squash::squash(&request));
    let report = result.map_err(|e| Failure::from(e).raise(py))?;
    serde_json::to_string(&report).map_err(|e| Failure::new("internal", e.to_string()).raise(py))
}

fn freezer(pid: i32) -> Result<Freezer, torpor_engine::Error> {
    Freezer::of(pid).about(pid, "cgroup")?.ok_or_else(|| {
        torpor_engine::Error::unsupported(pid, "cgroup", "the container has no cgroup of its own to freeze", "")
    })
}

/// Pauses or resumes the container whose init is `pid`.
#[pyfunction]
fn set_frozen(py: Python<'_>, pid: i32, frozen: bool) -> PyResult<()> {
    let result = py.detach(|| {
        let freezer = freezer(pid)?;
        let done = if frozen {
            freezer.freeze(Duration::from_secs(10))
        } else {
            freezer.thaw()
        };
        done.about(pid, "freezer")
    });
    result.map_err(|e| Failure::from(e).raise(py))
}

/// Whether the container whose init is `pid` is paused.
#[pyfunction]
fn is_frozen(py: Python<'_>, pid: i32) -> PyResult<bool> {
    let result = py.detach(|| match Freezer::of(pid).about(pid, "cgroup")? {
        Some(freezer) => freezer.is_frozen().about(pid, "freezer"),
        None => Ok(false),
    });
    result.map_err(|e| Failure::from(e).raise(py))
}
