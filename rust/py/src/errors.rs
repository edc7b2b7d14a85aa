//! Errors on their way to Python: the one place where they become exceptions.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use serde::{Deserialize, Serialize};

/// What is told of an error across a process and a language.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// Slug of docs/internals.md §5.
    pub code: String,
    /// Stage, where known.
    pub stage: Option<String>,
    /// Task, where known.
    pub pid: Option<i32>,
    /// Object, where known.
    pub object: Option<String>,
    /// For people.
    pub message: String,
}

impl From<torpor_engine::Error> for Failure {
    fn from(mut error: torpor_engine::Error) -> Failure {
        Failure {
            code: error.code().into(),
            stage: error.stage().map(|s| s.name().into()),
            pid: error.pid(),
            object: error.object().map(String::from),
            message: error.to_string(),
        }
    }
}

impl Failure {
    /// A failure that no stage of the engine knows.
    pub fn new(code: &str, message: impl Into<String>) -> Failure {
        Failure {
            code: code.into(),
            stage: None,
            pid: None,
            object: None,
            message: message.into(),
        }
    }

    /// The exception, of the class that `torpor.errors` has for the code.
    pub fn raise(&self, py: Python<'_>) -> PyErr {
        let make = || -> PyResult<Bound<'_, PyAny>> {
            let module = py.import("torpor.errors")?;
            let args = (&self.code, &self.stage, self.pid, &self.object, &self.message);
            module.call_method1("from_engine", args)
        };
        match make() {
            Ok(exception) => PyErr::from_value(exception),
            Err(_) => PyRuntimeError::new_err(self.message.clone()),
        }
    }
}
