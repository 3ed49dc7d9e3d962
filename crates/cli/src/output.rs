//! Output: aligned columns, JSON, YAML. Data goes to stdout; text of tenants is printed without control characters.

use std::process::ExitCode;

use clap::ValueEnum;
use jiff::Timestamp;
use serde::Serialize;

use crate::failure::Failure;

/// How a list or an object is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    #[value(hide = true)]
    Table,
    Wide,
    Json,
    Yaml,
}

/// Prints `value` as JSON or YAML, or the rows of `table`.
pub fn print(
    format: Format,
    value: &impl Serialize,
    table: impl FnOnce(bool) -> Vec<Vec<String>>,
) -> Result<ExitCode, Failure> {
    let text = match format {
        Format::Json => serde_json::to_string_pretty(value).map_err(|error| Failure::new(error.to_string()))? + "\n",
        Format::Yaml => serde_saphyr::to_string(value).map_err(|error| Failure::new(error.to_string()))?,
        Format::Table => columns(&table(false)),
        Format::Wide => columns(&table(true)),
    };
    write(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// Writes to stdout; a reader that went away is no error worth telling.
pub fn write(bytes: &[u8]) -> Result<(), Failure> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(Failure::from),
    }
}

/// Rows, the first the heads, three spaces between columns.
fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |at: usize| rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|at| width(at).unwrap_or_default()).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{:width$}   ", printable(cell)));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The text without what could drive a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// How long ago, as kubectl says it: `5s`, `3m`, `7h`, `12d`.
pub fn age(at: Timestamp) -> String {
    let seconds = Timestamp::now().duration_since(at).as_secs().max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}
