//! How a command fails: one `error:` line, a `hint:` where a person can act, and the exit code.

use std::process::ExitCode;

use joey_model::Fault;
use joey_rpc::RpcError;

/// The end of a command that failed.
#[derive(Debug)]
pub struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    /// Something went wrong: exit code 1.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, code: 1 }
    }

    /// The command line is wrong: exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, code: 2 }
    }

    /// The same with another exit code: that of what was run.
    pub fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    /// Something went wrong, and why, down to the first cause.
    pub fn caused(what: &str, error: &dyn std::error::Error) -> Self {
        let mut message = format!("{what}: {error}");
        let mut source = error.source();
        while let Some(cause) = source {
            message.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        Self::new(message)
    }

    /// What was being shown broke off, which says nothing of what it was of.
    pub fn broke_off(error: &std::io::Error) -> Self {
        Self::new(format!("the connection to joey broke: {error}"))
            .with_hint("is joey up still running? instances go on without it, and are there when it is back")
    }

    /// Several failures of one command as one, each reason told once; `None` of none.
    pub fn all(failures: Vec<Self>) -> Option<Self> {
        let mut told: Vec<String> = Vec::new();
        let (mut hint, mut code) = (None, None);
        for failure in failures {
            hint = hint.or(failure.hint);
            code = code.or(Some(failure.code));
            if !told.contains(&failure.message) {
                told.push(failure.message);
            }
        }
        Some(Self { message: told.join("\nerror: "), hint, code: code? })
    }

    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn without_hint(self) -> Self {
        Self { hint: None, ..self }
    }

    /// Tells a person and gives the exit code. Control characters of a tenant's or registry's text are not passed on.
    pub fn tell(self) -> ExitCode {
        eprintln!("error: {}", crate::output::printable(&self.message));
        if let Some(hint) = self.hint {
            eprintln!("hint: {}", crate::output::printable(&hint));
        }
        ExitCode::from(self.code)
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self { message: fault.message, hint: fault.hint, code: 1 }
    }
}

impl From<RpcError> for Failure {
    fn from(error: RpcError) -> Self {
        match error {
            RpcError::Connect { peer, source } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                Self::new(format!("joey at {peer} cannot be asked: {source}"))
                    .with_hint("it answers root only: use sudo")
            }
            RpcError::Connect { peer, source } => Self::new(format!("no joey answers at {peer}: {source}"))
                .with_hint("start it with `joey up`, or name its data directory with --data-dir"),
            other => Fault::from(other).into(),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        let failure = Self::new(error.to_string());
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => failure.with_hint("this may need root: use sudo"),
            _ => failure,
        }
    }
}
