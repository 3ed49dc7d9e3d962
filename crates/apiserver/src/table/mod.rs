//! Answers in other forms than the object's own: tables for people, metadata alone for controllers.

pub mod plain;
pub mod pod;

use http::HeaderMap;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::kinds::Resource;
use crate::object::text;
use crate::request::{Query, accepted};
use crate::status::{ApiError, ApiResult};

/// One column and how its cell comes out of an object.
pub struct Column {
    pub name: &'static str,
    /// `string`, `integer`, `date`.
    pub kind: &'static str,
    pub format: &'static str,
    pub description: &'static str,
    /// 0: always shown; 1: shown with `-o wide`.
    pub priority: u8,
    pub cell: fn(&Value) -> Value,
}

/// A text column that is always shown.
pub const fn column(name: &'static str, description: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column { name, kind: "string", format: "", description, priority: 0, cell }
}

/// A text column that is shown with `-o wide`.
pub const fn wide(name: &'static str, description: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column { name, kind: "string", format: "", description, priority: 1, cell }
}

/// The first column of every table.
pub const NAME: Column = Column {
    name: "Name",
    kind: "string",
    format: "name",
    description: "Name of the object, unique among those of its kind and namespace.",
    priority: 0,
    cell: |value| text(value, "/metadata/name").into(),
};

/// Time since creation.
pub const AGE: Column =
    column("Age", "Time since the object was created.", |value| age(text(value, "/metadata/creationTimestamp")));

/// Columns of kinds that have none of their own.
pub const DEFAULT: &[Column] = &[NAME, AGE];

/// How much of the object goes with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Include {
    Nothing,
    Metadata,
    Object,
}

/// The form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Plain,
    Metadata,
    Table(Include),
}

impl Form {
    pub fn media_type(self) -> &'static str {
        "application/json"
    }

    pub fn watch_media_type(self) -> &'static str {
        "application/json"
    }
}

/// The first form of the Accept header that can be given.
pub fn form(headers: &HeaderMap, query: &Query) -> ApiResult<Form> {
    for wanted in accepted(headers) {
        if !wanted.is_json() {
            continue;
        }
        if wanted.parameter("as").is_empty() {
            return Ok(Form::Plain);
        }
        if wanted.wants("Table", "meta.k8s.io", "v1") {
            return include(query).map(Form::Table);
        }
        if wanted.wants("PartialObjectMetadata", "meta.k8s.io", "v1")
            || wanted.wants("PartialObjectMetadataList", "meta.k8s.io", "v1")
        {
            return Ok(Form::Metadata);
        }
    }
    let mut error = ApiError::bad_request(
        "only the following media types are accepted: application/json, \
         application/json;as=Table;g=meta.k8s.io;v=v1, application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
    );
    error.code = http::StatusCode::NOT_ACCEPTABLE;
    error.reason = "NotAcceptable";
    Err(error)
}

fn include(query: &Query) -> ApiResult<Include> {
    match query.get("includeObject") {
        None | Some("" | "Metadata") => Ok(Include::Metadata),
        Some("None") => Ok(Include::Nothing),
        Some("Object") => Ok(Include::Object),
        Some(other) => Err(ApiError::bad_request(format!("unrecognized includeObject value: \"{other}\""))),
    }
}

/// A table of rows.
pub fn table(resource: &Resource, metadata: Value, rows: Vec<Value>, headers: bool) -> Value {
    let columns: Option<Vec<Value>> = headers.then(|| {
        resource
            .columns
            .iter()
            .map(|column| {
                json!({"name": column.name, "type": column.kind, "format": column.format,
                    "description": column.description, "priority": column.priority})
            })
            .collect()
    });
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "columnDefinitions": columns,
        "rows": rows})
}

/// The row of one object.
pub fn row(resource: &Resource, value: &Value, include: Include) -> Value {
    // Cells are made from the stored form, whatever form was asked for.
    let cells: Vec<Value> = resource.columns.iter().map(|column| (column.cell)(value)).collect();
    match include {
        Include::Nothing => json!({"cells": cells}),
        Include::Metadata => json!({"cells": cells, "object": metadata_only(value, true)}),
        Include::Object => json!({"cells": cells, "object": value}),
    }
}

/// The object as PartialObjectMetadata; items of a list go without their kind.
pub fn metadata_only(value: &Value, with_kind: bool) -> Value {
    let mut out = json!({"metadata": value["metadata"]});
    if with_kind {
        out["kind"] = "PartialObjectMetadata".into();
        out["apiVersion"] = "meta.k8s.io/v1".into();
    }
    out
}

/// One object in the form asked for.
pub fn shown(resource: &Resource, value: Value, form: Form) -> Value {
    match form {
        _ if text(&value, "/kind") == "Status" => value,
        Form::Plain => value,
        Form::Metadata => metadata_only(&value, true),
        Form::Table(include) => {
            let metadata = json!({"resourceVersion": text(&value, "/metadata/resourceVersion")});
            let row = row(resource, &value, include);
            table(resource, metadata, vec![row], true)
        }
    }
}

/// Time since an RFC 3339 time in the short form of kubectl: `5s`, `3m2s`, `4h`, `2d`.
pub fn age(since: &str) -> Value {
    if since.is_empty() {
        return "<unknown>".into();
    }
    match since.parse::<Timestamp>() {
        Ok(since) => span((Timestamp::now() - since).total(jiff::Unit::Second).unwrap_or(0.0) as i64).into(),
        Err(_) => "<invalid>".into(),
    }
}

/// Seconds in the short form of kubectl.
pub fn span(seconds: i64) -> String {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    let two = |big: i64, unit: char, small: i64, small_unit: char| match small {
        0 => format!("{big}{unit}"),
        small => format!("{big}{unit}{small}{small_unit}"),
    };
    match seconds {
        s if s < -1 => "<invalid>".to_owned(),
        s if s < 0 => "0s".to_owned(),
        s if s < 2 * MINUTE => format!("{s}s"),
        s if s < 10 * MINUTE => two(s / MINUTE, 'm', s % MINUTE, 's'),
        s if s < 3 * HOUR => format!("{}m", s / MINUTE),
        s if s < 8 * HOUR => two(s / HOUR, 'h', s % HOUR / MINUTE, 'm'),
        s if s < 2 * DAY => format!("{}h", s / HOUR),
        s if s < 8 * DAY => two(s / DAY, 'd', s % DAY / HOUR, 'h'),
        s if s < 2 * 365 * DAY => format!("{}d", s / DAY),
        s if s < 8 * 365 * DAY => two(s / (365 * DAY), 'y', s / DAY % 365, 'd'),
        s => format!("{}y", s / (365 * DAY)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        for (seconds, text) in [
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (185, "3m5s"),
            (3600, "60m"),
            (3 * 3600 + 60, "3h1m"),
            (86400, "24h"),
            (3 * 86400 + 3600, "3d1h"),
            (400 * 86400, "400d"),
            (3 * 365 * 86400 + 86400, "3y1d"),
        ] {
            assert_eq!(span(seconds), text, "{seconds}");
        }
        assert_eq!(age(""), "<unknown>");
    }
}
