//! Runs `nft` and `tc` with their input on standard input. Nothing that a tenant wrote ever goes into that text.

use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::error::NetworkError;

/// Runs `program` with `input`; what it complains about is the error.
pub(crate) async fn run(program: &'static str, arguments: &[&str], input: &str) -> Result<(), NetworkError> {
    let missing = |error: std::io::Error| NetworkError::Program {
        program,
        output: match error.kind() {
            std::io::ErrorKind::NotFound => "it is not installed (Debian packages nftables and iproute2)".to_owned(),
            _ => error.to_string(),
        },
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(missing)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends early says why on standard error, which says more than a broken pipe.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(missing)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(NetworkError::Program { program, output: text.lines().next().unwrap_or("no reason given").trim().to_owned() })
}
