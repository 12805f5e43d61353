//! The golden program: runs each primitive of kernels/ptx.cuh alone on a GPU and compares the
//! outputs with the software device's.
//!
//! `golden CASES IMAGES RECORD`: CASES is the folder that the C++ tests wrote with `--write-golden`
//! (operands, and the software device's outputs), IMAGES has golden.fatbin and golden_sm90.fatbin,
//! and RECORD gets one line per case: its name and the hash of the output of the device that
//! MOE_DEVICE selects. The C++ tests compare the software device with every record that is
//! committed as emulator/golden/<gpu>.txt.

use std::collections::HashMap;
use std::error::Error;
use std::ffi::{CString, c_void};
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, result, sys};
use moe_emulator::{Choice, Driver};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Words before the data of a case's operands.
const HEADER_WORDS: usize = 64;

/// A module without kernels: on the software device they are found by name.
const PLACEHOLDER: &[u8] = b".version 7.0\n.target sm_80\n.address_size 64\n\0";

/// A line of cases.txt.
struct Case {
    name: String,
    symbol: String,
    fields: HashMap<String, String>,
}

impl Case {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace().map(str::to_owned);
        let (name, symbol) = (words.next()?, words.next()?);
        let fields =
            words.filter_map(|w| Some((w.split_once('=')?.0.into(), w.split_once('=')?.1.into())));
        Some(Self { name, symbol, fields: fields.collect() })
    }

    fn number(&self, field: &str) -> Result<u64> {
        let text = self.fields.get(field).ok_or_else(|| format!("{}: no {field}", self.name))?;
        Ok(text.parse()?)
    }

    fn list(&self, field: &str) -> Result<Vec<u64>> {
        let text = self.fields.get(field).ok_or_else(|| format!("{}: no {field}", self.name))?;
        let numbers = text.split(',').filter(|item| *item != "-").map(str::parse);
        Ok(numbers.collect::<std::result::Result<_, _>>()?)
    }
}

/// 128 bytes that the driver fills and a kernel takes by value.
#[repr(C, align(64))]
struct TensorMap([u8; 128]);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [cases, images, record] = &arguments[..] else {
        return Err("usage: golden CASES IMAGES RECORD".into());
    };
    let driver = moe_emulator::choose(Choice::from_env()?)?;
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let capability = context.compute_capability()?;
    let modules = load_modules(driver, Path::new(images), capability)?;

    let list = fs::read_to_string(Path::new(cases).join("cases.txt"))?;
    let mut record = fs::File::create(record)?; // Line by line: a case may crash the device.
    let (mut total, mut wrong, mut absent) = (0, 0, 0);
    for case in list.lines().filter_map(Case::parse) {
        let Some(function) = find(&modules, &case.symbol) else {
            absent += 1;
            continue;
        };
        let want = words(&fs::read(Path::new(cases).join(format!("{}.out", case.name)))?);
        let input = words(&fs::read(Path::new(cases).join(format!("{}.in", case.name)))?);
        let got = run(&stream, function, &case, &input)?;
        writeln!(record, "{} {:016x}", case.name, hash(&got))?;
        total += 1;
        if got != want {
            let at =
                got.iter().zip(&want).position(|(got, want)| got != want).unwrap_or(want.len());
            println!(
                "{}: word {at} is {:08x?}, the software device has {:08x?}",
                case.name,
                got.get(at),
                want.get(at)
            );
            wrong += 1;
        }
    }
    println!(
        "{} ({driver}, {}.{}): {total} cases, {wrong} differ from the software device, {absent} not for this GPU",
        context.name()?,
        capability.0,
        capability.1,
    );
    if wrong > 0 || total == 0 { Err("the software device is wrong".into()) } else { Ok(()) }
}

/// The portable image, and on compute capability 9.0 that of Hopper's primitives.
fn load_modules(
    driver: Driver,
    images: &Path,
    capability: (i32, i32),
) -> Result<Vec<sys::CUmodule>> {
    let mut modules = Vec::new();
    for name in ["golden", "golden_sm90"] {
        if name == "golden_sm90" && capability != (9, 0) {
            continue;
        }
        let bytes = match driver {
            Driver::Emulator => PLACEHOLDER.to_vec(),
            Driver::Cuda => fs::read(images.join(format!("{name}.fatbin")))?,
        };
        // SAFETY: the bytes are PTX with its final zero, or the output of nvcc.
        modules.push(unsafe { result::module::load_data(bytes.as_ptr().cast()) }?);
    }
    Ok(modules)
}

fn find(modules: &[sys::CUmodule], symbol: &str) -> Option<sys::CUfunction> {
    let name = CString::new(symbol).ok()?;
    // SAFETY: modules stay loaded to the end of the program.
    modules
        .iter()
        .find_map(|module| unsafe { result::module::get_function(*module, name.clone()) }.ok())
}

fn run(
    stream: &Arc<CudaStream>,
    function: sys::CUfunction,
    case: &Case,
    input: &[u32],
) -> Result<Vec<u32>> {
    let input = stream.clone_htod(input)?;
    let output: CudaSlice<u32> = stream.alloc_zeros(case.number("out_words")? as usize)?;
    let (mut input_address, _input_guard) = input.device_ptr(stream);
    let (mut output_address, _output_guard) = output.device_ptr(stream);
    let mut map = TensorMap([0; 128]);
    let mut arguments: Vec<*mut c_void> =
        vec![(&raw mut output_address).cast(), (&raw mut input_address).cast()];
    if let Some(over) = case.fields.get("map") {
        let base =
            if over == "out" { output_address } else { input_address + HEADER_WORDS as u64 * 4 };
        encode(&mut map, case, base)?;
        arguments.push((&raw mut map).cast());
    }
    let cluster = case.number("cluster")? as u32;
    let shared = case.number("shared")? as u32;
    use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
    // SAFETY: the function's module stays loaded.
    unsafe { sys::cuFuncSetAttribute(function, SHARED, shared as i32) }.result()?;
    // SAFETY: all zeros is a value of this plain struct.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim =
        sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: cluster, y: 1, z: 1 };
    let config = sys::CUlaunchConfig {
        gridDimX: cluster,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: case.number("threads")? as u32,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: stream.cu_stream(),
        attrs: &mut attribute,
        numAttrs: u32::from(cluster > 1),
    };
    // SAFETY: every entry takes the output, the input and, if cases.txt has one, a tensor map.
    unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), null_mut()) }
        .result()?;
    Ok(stream.clone_dtoh(&output)?)
}

fn encode(map: &mut TensorMap, case: &Case, base: u64) -> Result<()> {
    let (dim, stride) = (case.list("dim")?, case.list("stride")?);
    let boxes: Vec<u32> = case.list("box")?.into_iter().map(|size| size as u32).collect();
    let ones = vec![1u32; dim.len()];
    // SAFETY: both enumerations are driver constants that the C++ tests wrote.
    let (data_type, swizzle) = unsafe {
        (
            std::mem::transmute::<u32, sys::CUtensorMapDataType>(case.number("type")? as u32),
            std::mem::transmute::<u32, sys::CUtensorMapSwizzle>(case.number("swizzle")? as u32),
        )
    };
    // SAFETY: the lists have an entry for each dimension, strides one less; the map has 128 bytes.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            (&raw mut *map).cast(),
            data_type,
            dim.len() as u32,
            base as *mut c_void,
            dim.as_ptr(),
            stride.as_ptr(),
            boxes.as_ptr(),
            ones.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()?;
    Ok(())
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect()
}

/// FNV-1a over the bytes.
fn hash(words: &[u32]) -> u64 {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
