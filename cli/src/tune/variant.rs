//! Loads a variant of grouped_gemm from the list that gpu/tune-variants writes. Constants and
//! images are checked before they reach the driver.

use std::ffi::CString;
use std::fmt::Display;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Component, Path};

use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::{DriverError, result, sys};
use serde_json::Value;

use super::TILE_ROWS;
use crate::device::Gpu;
use crate::error::{Error, Result, io};
use crate::text::escaped;

/// Limits on files. A list has kilobytes, an image about a megabyte.
const MAX_LIST_BYTES: u64 = 16 << 20;
const MAX_IMAGE_BYTES: u64 = 256 << 20;

/// The kernels of both products in bf16, and their launch constants.
pub(super) struct Variant {
    pub(super) name: String,
    pub(super) constants: Value,
    pub(super) gate_up: sys::CUfunction,
    pub(super) plain: sys::CUfunction,
    pub(super) launch: Constants,
}

/// The constants of kernels/abi.h that a launch depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Constants {
    pub(super) block_n: usize,
    pub(super) tile_group: usize,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
}

impl Constants {
    fn read(constants: &Value) -> std::result::Result<Self, String> {
        let number = |key: &str, wanted: RangeInclusive<u32>, step: u32| {
            let value = constants[key].as_u64().and_then(|value| u32::try_from(value).ok());
            let good = value.filter(|value| wanted.contains(value) && value.is_multiple_of(step));
            good.ok_or_else(|| {
                let (least, most) = (wanted.start(), wanted.end());
                let wanted = format!("wanted a multiple of {step} from {least} to {most}");
                format!("{key} is {}, {wanted}", constants[key])
            })
        };
        let rows = number("GEMM_BLOCK_M", 1..=4096, 1)?;
        if rows as usize != TILE_ROWS {
            return Err(format!(
                "GEMM_BLOCK_M is {rows}, wanted {TILE_ROWS}, the rows of the plan's tiles"
            ));
        }
        Ok(Self {
            // Even: with a gate, half of a block's columns are of gate and half of up.
            block_n: number("GEMM_BLOCK_N", 2..=4096, 2)? as usize,
            tile_group: number("GEMM_TILE_GROUP", 1..=4096, 1)? as usize,
            threads: number("GEMM_THREADS_MMA", 32..=1024, 32)?,
            shared_bytes: number("GROUPED_GEMM_SMEM_BYTES", 0..=1 << 20, 1)?,
        })
    }
}

impl Variant {
    /// Checks an entry of the list and loads its image.
    pub(super) fn load(gpu: &Gpu, folder: &Path, entry: &Value) -> Result<Self> {
        let list = folder.join("variants.json");
        let bad = |why: String| bad_file(&list, format!("variant {}: {why}", entry["name"]));
        let name = entry["name"].as_str().ok_or_else(|| bad("no `name`".into()))?;
        let launch = Constants::read(&entry["constants"]).map_err(bad)?;
        let image = entry["image"].as_str().unwrap_or_default();
        // A file name without a folder, and not `..`.
        let mut parts = Path::new(image).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == image)
        {
            return Err(bad(format!(
                "`image` is {image:?}, wanted the name of a file in the folder"
            )));
        }
        let image = Image::read(&folder.join(image))?;
        // SAFETY: the image has the length in its header or ends with a zero, and is aligned.
        let module = unsafe { result::module::load_data(image.words.as_ptr().cast()) }
            .map_err(gpu.failed("load a variant"))?;
        let function = |symbol: &str| -> std::result::Result<sys::CUfunction, DriverError> {
            let name = CString::new(symbol).expect("a symbol has no zero");
            // SAFETY: the module is never unloaded.
            let function = unsafe { result::module::get_function(module, name) }?;
            let attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = launch.shared_bytes as i32;
            // SAFETY: as above.
            unsafe { result::function::set_function_attribute(function, attribute, bytes) }?;
            Ok(function)
        };
        let find = gpu.failed("find a variant's kernel");
        Ok(Self {
            name: escaped(name),
            constants: entry["constants"].clone(),
            gate_up: function("moe_grouped_gemm_fwd_gate_up_bf16").map_err(&find)?,
            plain: function("moe_grouped_gemm_fwd_bf16").map_err(&find)?,
            launch,
        })
    }
}

// ---- Files --------------------------------------------------------------------------------------

pub(super) fn read_list(path: &Path) -> Result<Value> {
    let text = read(path, MAX_LIST_BYTES)?;
    serde_json::from_slice(&text).map_err(|error| bad_file(path, error))
}

pub(super) fn bad_file(path: &Path, why: impl Display) -> Error {
    Error::File { file: path.display().to_string(), why: why.to_string() }
}

/// Reads a regular file of at most `most` bytes. Links, folders, pipes and devices are errors.
fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let found = fs::symlink_metadata(path).map_err(io("read", path))?;
    if !found.is_file() {
        return Err(bad_file(path, "not a regular file"));
    }
    if found.len() > most {
        return Err(bad_file(path, format!("{} bytes, wanted at most {most}", found.len())));
    }
    fs::read(path).map_err(io("read", path))
}

/// A fat binary or PTX. The driver takes a pointer without a length.
struct Image {
    /// The bytes, followed by zeros, which terminate PTX.
    words: Vec<u128>,
}

impl Image {
    fn read(path: &Path) -> Result<Self> {
        let bytes = read(path, MAX_IMAGE_BYTES)?;
        check_image(&bytes).map_err(|why| bad_file(path, why))?;
        let mut words = vec![0u128; bytes.len() / size_of::<u128>() + 1];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
        Ok(Self { words })
    }
}

/// Checks an image against the lengths in its headers, so that the driver does not read out of
/// bounds.
fn check_image(bytes: &[u8]) -> std::result::Result<(), String> {
    const FAT_BINARY: u64 = 0xba55_ed50;
    if number(bytes, 0, 4) == Some(FAT_BINARY) {
        let end = part(bytes, 0, (6, 2)).filter(|end| *end == bytes.len());
        end.ok_or("a fat binary whose length differs from that in its header")?;
        let mut at = FAT_HEADER;
        while at < bytes.len() {
            at = part(bytes, at, (4, 4))
                .ok_or("a fat binary with a part that ends after the file")?;
        }
        return Ok(());
    }
    if !bytes.starts_with(b".version") && !bytes.starts_with(b"//") {
        return Err("neither a fat binary nor PTX".into());
    }
    let text = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if text.contains(&0) { Err("PTX with a zero byte before its end".into()) } else { Ok(()) }
}

/// Bytes of a fat binary's header; that of a part is longer.
const FAT_HEADER: usize = 16;

/// Returns the end of a header at `at` and its content, if both are within the image. `length` is
/// the offset and size of the field with the header's length; the content's length is at offset 8,
/// in eight bytes.
fn part(bytes: &[u8], at: usize, length: (usize, usize)) -> Option<usize> {
    let header = usize::try_from(number(bytes, at + length.0, length.1)?).ok()?;
    let content = usize::try_from(number(bytes, at + 8, 8)?).ok()?;
    let end = at.checked_add(header)?.checked_add(content)?;
    (header >= FAT_HEADER && end <= bytes.len()).then_some(end)
}

/// Reads an unsigned little-endian integer of `len` bytes.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let digits = bytes.get(at..at.checked_add(len)?)?;
    Some(digits.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}
