//! Why a checkpoint or a restore did not happen: the stage, the task, the object, the cause.

use crate::stage::Stage;

/// Result of every function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The error of this crate. `stage` is filled in where the stage ends.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    /// State that cannot be carried. Nothing was changed.
    #[error("{}{object}: {why}{}", task(*pid), hint(remedy))]
    Unsupported {
        stage: Option<Stage>,
        pid: Option<i32>,
        object: String,
        why: String,
        remedy: String,
    },
    /// The image asks for something that the container it is restored into does not grant.
    #[error("{}{object}: {why}", task(*pid))]
    Refused {
        stage: Option<Stage>,
        pid: Option<i32>,
        object: String,
        why: String,
    },
    /// A kernel call failed.
    #[error("{}{object}: {source}", task(*pid))]
    Kernel {
        stage: Option<Stage>,
        pid: Option<i32>,
        object: String,
        source: torpor_sys::Error,
    },
    /// The image cannot be written or read.
    #[error("{source}")]
    Image {
        stage: Option<Stage>,
        source: torpor_image::Error,
    },
    /// Whoever asked for it is gone; everything was undone.
    #[error("interrupted: the command that asked for it is gone")]
    Cancelled { stage: Option<Stage> },
    /// A test asked for this failure.
    #[error("failpoint")]
    Failpoint { stage: Option<Stage> },
    /// The image says something that cannot be.
    #[error("checkpoint.img is damaged: {what}")]
    Nonsense { stage: Option<Stage>, what: String },
}

fn task(pid: Option<i32>) -> String {
    pid.map(|p| format!("process {p}: ")).unwrap_or_default()
}

fn hint(remedy: &str) -> String {
    if remedy.is_empty() {
        String::new()
    } else {
        format!("; {remedy}")
    }
}

impl Error {
    /// State that cannot be carried.
    pub fn unsupported(pid: i32, object: impl Into<String>, why: impl Into<String>, remedy: &str) -> Error {
        let (object, why, remedy) = (object.into(), why.into(), remedy.into());
        Error::Unsupported {
            stage: None,
            pid: Some(pid),
            object,
            why,
            remedy,
        }
    }

    /// More than the container grants.
    pub fn refused(pid: i32, object: impl Into<String>, why: impl Into<String>) -> Error {
        Error::Refused {
            stage: None,
            pid: Some(pid),
            object: object.into(),
            why: why.into(),
        }
    }

    /// The image contradicts itself.
    pub fn nonsense(what: impl Into<String>) -> Error {
        Error::Nonsense {
            stage: None,
            what: what.into(),
        }
    }

    fn stage_mut(&mut self) -> &mut Option<Stage> {
        match self {
            Error::Unsupported { stage, .. }
            | Error::Refused { stage, .. }
            | Error::Kernel { stage, .. }
            | Error::Image { stage, .. }
            | Error::Cancelled { stage }
            | Error::Failpoint { stage }
            | Error::Nonsense { stage, .. } => stage,
        }
    }

    /// The same error, said to come from this stage unless it already names one.
    #[must_use]
    pub fn in_stage(mut self, stage: Stage) -> Error {
        self.stage_mut().get_or_insert(stage);
        self
    }

    /// The same error, with more about where its object is.
    #[must_use]
    pub fn within(mut self, place: &str) -> Error {
        if let Error::Unsupported { object, .. } | Error::Kernel { object, .. } = &mut self {
            object.insert_str(0, place);
        }
        self
    }

    /// A stable word for programs (docs/internals.md §5).
    pub fn code(&self) -> &'static str {
        match self {
            Error::Unsupported { .. } => "unsupported",
            Error::Refused { .. } => "refused-power",
            Error::Kernel {
                source: torpor_sys::Error::Timeout { .. },
                ..
            } => "freeze-timeout",
            Error::Kernel {
                source: torpor_sys::Error::Died { .. },
                ..
            } => "task-died",
            Error::Kernel { .. } => "kernel",
            Error::Image { source, .. } => source.code(),
            Error::Cancelled { .. } => "cancelled",
            Error::Failpoint { .. } => "failpoint",
            Error::Nonsense { .. } => "image-corrupt",
        }
    }

    /// The stage it happened in.
    pub fn stage(&mut self) -> Option<Stage> {
        *self.stage_mut()
    }

    /// The task it is about.
    pub fn pid(&self) -> Option<i32> {
        match self {
            Error::Unsupported { pid, .. } | Error::Refused { pid, .. } => *pid,
            Error::Kernel { pid, source, .. } => pid.or(source.pid()),
            _ => None,
        }
    }

    /// The object it is about.
    pub fn object(&self) -> Option<&str> {
        match self {
            Error::Unsupported { object, .. } | Error::Refused { object, .. } | Error::Kernel { object, .. } => {
                Some(object)
            }
            _ => None,
        }
    }
}

impl From<torpor_sys::Error> for Error {
    fn from(source: torpor_sys::Error) -> Error {
        Error::Kernel {
            stage: None,
            pid: source.pid(),
            object: "kernel".into(),
            source,
        }
    }
}

impl From<torpor_image::Error> for Error {
    fn from(source: torpor_image::Error) -> Error {
        Error::Image { stage: None, source }
    }
}

/// Says which task and object a kernel error is about.
pub trait About<T> {
    /// Adds both.
    fn about(self, pid: i32, object: impl Into<String>) -> Result<T>;
}

impl<T> About<T> for torpor_sys::Result<T> {
    fn about(self, pid: i32, object: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::Kernel {
            stage: None,
            pid: Some(pid),
            object: object.into(),
            source,
        })
    }
}
