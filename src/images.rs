//! The compiled kernel files, embedded by build.rs.

/// One kernel file, compiled.
pub(crate) struct Image {
    /// The stem of the kernel file.
    pub(crate) name: &'static str,
    /// Its targets, such as `sm_80 sm_90 compute_90`; empty for a placeholder.
    pub(crate) architectures: &'static str,
    /// A fat binary; for a placeholder, PTX without kernels.
    pub(crate) bytes: &'static [u8],
}

/// Aligns an image: the driver reads its header as words.
#[repr(C, align(16))]
struct Aligned<T>(T);

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// A kernel file of this binary; see [`kernel_files`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelFile {
    /// The stem of the file in kernels/.
    pub name: &'static str,
    /// The targets that it was compiled for, such as `sm_80 sm_90 compute_90`; empty without nvcc.
    pub architectures: &'static str,
    /// The size of the image in bytes.
    pub bytes: usize,
}

/// The kernel files compiled into this binary.
pub fn kernel_files() -> impl Iterator<Item = KernelFile> {
    IMAGES.iter().map(|image| KernelFile {
        name: image.name,
        architectures: image.architectures,
        bytes: image.bytes.len(),
    })
}

/// The version of the CUDA toolkit that compiled the kernels of this binary, major and minor, such
/// as (13, 0); `None` without kernels. A driver of at least that major version loads them.
pub fn kernel_toolkit() -> Option<(u32, u32)> {
    TOOLKIT
}

#[cfg(test)]
mod tests {
    use super::IMAGES;

    #[test]
    fn embedded_size_is_at_most_10_mib() {
        let total: usize = IMAGES.iter().map(|image| image.bytes.len()).sum();
        assert!(total <= 10 << 20, "{total} bytes of images, wanted 10 MiB at most");
    }

    /// Checks the report of ptxas for each image: no kernel spills registers, and no wgmma is
    /// serialised (C75xx).
    #[test]
    fn no_kernel_spills() {
        for image in IMAGES.iter().filter(|image| !image.architectures.is_empty()) {
            let file = format!("{}/{}.ptxas", env!("OUT_DIR"), image.name);
            let report = std::fs::read_to_string(&file).unwrap();
            let entries = report.matches("Compiling entry function").count();
            assert!(entries > 0, "{file} lists no kernel:\n{report}");
            let clean = report.matches(" 0 bytes spill stores, 0 bytes spill loads").count();
            assert_eq!(clean, entries, "{file}: a kernel spills:\n{report}");
            assert!(!report.contains("C75"), "{file}: wgmma is serialised:\n{report}");
        }
    }

    #[test]
    fn images_are_aligned_and_named_after_kernel_files() {
        for image in IMAGES {
            assert_eq!(image.bytes.as_ptr() as usize % 16, 0, "{}", image.name);
            let file = format!("{}/kernels/{}.cu", env!("CARGO_MANIFEST_DIR"), image.name);
            assert!(std::path::Path::new(&file).is_file(), "{file}");
        }
    }
}
