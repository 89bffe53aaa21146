//! Parquet rows, through the record API of the `parquet` crate, only the columns that are wanted.

use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::Collector;
use super::footer::{FOOTER_TAIL, MAX_SCHEMA_DEPTH, schema_depth};
use crate::document::Fields;
use crate::error::{CalibError, guard};

/// Where a parquet file lies.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ParquetInput<'a> {
    /// On disk.
    Path(&'a Path),
    /// In the program itself.
    Embedded(&'static [u8]),
}

/// Metadata of text datasets takes kilobytes; this is room for a hundred thousand row groups.
const MAX_FOOTER: u64 = 128 << 20;

/// Reads the wanted columns of all rows into `into`, until it is full.
pub(crate) fn read(
    input: ParquetInput<'_>,
    name: &str,
    fields: &Fields,
    into: &mut Collector,
) -> Result<(), CalibError> {
    if into.is_full() {
        return Ok(());
    }
    let wants = |column: &str| fields.wants(column);
    read_rows(input, name, &wants, &fields.wanted(), &mut |row| into.push(fields.document(row)?))
}

/// Hands each row's wanted columns to `sink`, until that says that it has enough; `wanted` describes the columns.
pub(super) fn read_rows(
    input: ParquetInput<'_>,
    name: &str,
    wants: &dyn Fn(&str) -> bool,
    wanted: &str,
    sink: &mut dyn FnMut(Map<String, Value>) -> Result<bool, String>,
) -> Result<(), CalibError> {
    let result = match input {
        ParquetInput::Path(path) => {
            let file = File::open(path).map_err(|e| CalibError::io(path, e))?;
            let meta = file.metadata().map_err(|e| CalibError::io(path, e))?;
            if !meta.is_file() {
                return Err(CalibError::Unsupported(format!("`{}` is not a regular file", path.display())));
            }
            guard(|| rows(file, name, wants, wanted, sink))
        }
        ParquetInput::Embedded(bytes) => guard(|| rows(Bytes::from_static(bytes), name, wants, wanted, sink)),
    };
    // The crate asserts on odd schemas and expects every row group to be there: damage can surface as a panic.
    result.unwrap_or_else(|panic| Err(damaged(name, &panic)))
}

fn damaged(name: &str, detail: &str) -> CalibError {
    CalibError::bad(
        name,
        format!("the parquet file is damaged or of an unknown kind ({detail}); fetch or write it again"),
    )
}

fn rows<R: ChunkReader + Length + 'static>(
    input: R,
    name: &str,
    wants: &dyn Fn(&str) -> bool,
    wanted: &str,
    sink: &mut dyn FnMut(Map<String, Value>) -> Result<bool, String>,
) -> Result<(), CalibError> {
    let broken = |e: ParquetError| damaged(name, &e.to_string());
    check_footer(&input, name)?;
    let reader = SerializedFileReader::new(input).map_err(broken)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns: Vec<_> = schema.get_fields().iter().filter(|f| wants(f.name())).cloned().collect();
    if columns.is_empty() {
        let mut found: Vec<_> = schema.get_fields().iter().take(24).map(|f| format!("`{}`", f.name())).collect();
        if found.is_empty() {
            found.push("none".to_owned());
        }
        return Err(CalibError::bad(name, format!("the file has the columns {}; wanted {wanted}", found.join(", "))));
    }
    let projection: Type = Type::group_type_builder(schema.name()).with_fields(columns).build().map_err(broken)?;
    for (number, row) in reader.get_row_iter(Some(projection)).map_err(broken)?.enumerate() {
        let at = || format!("{name}, row {}", number + 1);
        let row =
            row.map_err(|e| CalibError::bad(at(), format!("cannot be read ({e}); fetch or write the file again")))?;
        let row: Map<String, Value> = row.into_columns().into_iter().map(|(k, v)| (k, value(v))).collect();
        if !sink(row).map_err(|e| CalibError::bad(at(), e))? {
            break;
        }
    }
    Ok(())
}

/// Rejects what the crate would answer with a huge allocation or a stack overflow, neither of which can be caught.
fn check_footer<R: ChunkReader + Length>(input: &R, name: &str) -> Result<(), CalibError> {
    let broken = |e: ParquetError| damaged(name, &e.to_string());
    let size = input.len();
    if size < 2 * FOOTER_TAIL {
        return Err(damaged(name, &format!("{size} bytes are too few")));
    }
    let tail = input.get_bytes(size - FOOTER_TAIL, FOOTER_TAIL as usize).map_err(broken)?;
    if tail.get(4..8) != Some(b"PAR1") {
        return Err(damaged(name, "it does not end in `PAR1`"));
    }
    let length = tail.get(..4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    let length = u64::from(length);
    let start = size.checked_sub(FOOTER_TAIL).and_then(|end| end.checked_sub(length));
    let Some(start) = start.filter(|_| length <= MAX_FOOTER) else {
        return Err(damaged(name, &format!("its footer claims {length} bytes of {size}")));
    };
    let footer = input.get_bytes(start, length as usize).map_err(broken)?;
    match schema_depth(&footer) {
        Some(depth) if depth <= MAX_SCHEMA_DEPTH => Ok(()),
        Some(depth) => Err(damaged(name, &format!("its schema is nested {depth} levels deep"))),
        None => Err(damaged(name, "its footer cannot be parsed")),
    }
}

/// A parquet value as JSON, as far as rows need it: scalars that are neither text nor whole numbers keep only their kind.
fn value(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(b) => Value::Bool(b),
        Field::Str(text) => Value::String(text),
        // Text written without its annotation.
        Field::Bytes(bytes) => bytes.as_utf8().map_or(Value::Bool(false), |text| Value::String(text.to_owned())),
        Field::Group(row) => Value::Object(row.into_columns().into_iter().map(|(k, v)| (k, value(v))).collect()),
        Field::ListInternal(list) => Value::Array(list.elements().iter().cloned().map(value).collect()),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::MapInternal(_) => Value::Object(Map::new()),
        _ => Value::from(0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::footer::tests::nested;
    use super::super::{Limits, read_file};
    use super::*;
    use crate::document::{Document, Message};
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use proptest::prelude::*;
    use std::sync::Arc;

    /// Values, definition levels, repetition levels.
    type Column = (&'static [&'static str], Vec<i16>, Vec<i16>);

    /// A parquet file of string columns given with their definition and repetition levels.
    fn file(schema: &str, columns: &[Column]) -> Vec<u8> {
        let schema = Arc::new(parse_message_type(schema).expect("schema"));
        let mut bytes = Vec::new();
        let mut writer =
            SerializedFileWriter::new(&mut bytes, schema, Arc::new(WriterProperties::default())).expect("writer");
        let mut group = writer.next_row_group().expect("group");
        for (texts, definition, repetition) in columns {
            let mut column = group.next_column().expect("column").expect("one more");
            let texts: Vec<ByteArray> = texts.iter().map(|t| ByteArray::from(*t)).collect();
            let repetition = (!repetition.is_empty()).then_some(&repetition[..]);
            column.typed::<ByteArrayType>().write_batch(&texts, Some(definition), repetition).expect("write");
            column.close().expect("close");
        }
        group.close().expect("close");
        writer.close().expect("close");
        bytes
    }

    fn read_bytes(bytes: &[u8], fields: &Fields, rows: Option<usize>) -> Result<Vec<Document>, CalibError> {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("a.parquet");
        std::fs::write(&path, bytes).expect("write");
        let mut into = Collector::new(Limits::default(), rows);
        read_file(&path, "a.parquet", fields, &mut into).map(|_| into.documents)
    }

    const TEXTS: &str = "message m { optional binary text (STRING); optional binary url (STRING); }";

    fn texts() -> Vec<u8> {
        file(TEXTS, &[(&["a", "b", ""], vec![1, 1, 1], vec![]), (&["x"], vec![0, 1, 0], vec![])])
    }

    #[test]
    fn text_columns_are_read() {
        let wanted = ["a", "b", ""].map(|t| Document::Text(t.into()));
        assert_eq!(read_bytes(&texts(), &Fields::Any, None).expect("valid"), wanted);
        assert_eq!(read_bytes(&texts(), &Fields::Any, Some(2)).expect("valid"), wanted[..2]);
        let error = read_bytes(&texts(), &Fields::Text("url".into()), None).expect_err("null").to_string();
        assert!(error.contains("a.parquet, row 1: `url` is null"), "{error}");
        let error = read_bytes(&texts(), &Fields::Text("body".into()), None).expect_err("no column").to_string();
        assert!(error.contains("columns `text`, `url`; wanted `body`"), "{error}");
    }

    #[test]
    fn message_lists_are_read() {
        let schema = "message m { optional group messages (LIST) { repeated group list { optional group element {
            optional binary content (STRING); optional binary role (STRING); } } } }";
        let levels = || (vec![4, 4, 4], vec![0, 1, 0]);
        let column = |texts: &'static [&'static str]| -> Column { (texts, levels().0, levels().1) };
        let bytes = file(schema, &[column(&["hi", "hello", "bye"]), column(&["user", "assistant", "user"])]);
        let wanted = [
            Document::Chat(vec![Message::new("user", "hi"), Message::new("assistant", "hello")]),
            Document::Chat(vec![Message::new("user", "bye")]),
        ];
        assert_eq!(read_bytes(&bytes, &Fields::Any, None).expect("valid"), wanted);
    }

    #[test]
    fn damaged_files_are_errors() {
        let good = texts();
        let mut cut = good.clone();
        cut.truncate(good.len() - 3);
        let mut long = good.clone();
        let at = good.len() - 8;
        long[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut deep = b"PAR1".to_vec();
        let footer = nested(500_000);
        deep.extend(&footer);
        deep.extend((footer.len() as u32).to_le_bytes());
        deep.extend(b"PAR1");
        for (bytes, wanted) in [
            (&b"PAR1"[..], "too few"),
            (&cut, "does not end in `PAR1`"),
            (&long, "its footer claims 4294967295"),
            (&deep, "nested 65 levels"),
        ] {
            let error = read_bytes(bytes, &Fields::Any, None).expect_err("damaged");
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn flipped_bytes_never_crash(at: prop::sample::Index, value: u8) {
            let mut bytes = texts();
            let at = at.index(bytes.len());
            bytes[at] = value;
            let _ = read_bytes(&bytes, &Fields::Any, None);
        }
    }
}
