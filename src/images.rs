//! The compiled kernel files, embedded by build.rs.

/// One kernel file, compiled.
pub(crate) struct Image {
    /// The stem of the kernel file.
    pub(crate) name: &'static str,
    /// As in `sm_80 sm_90 compute_90`; empty for a placeholder.
    pub(crate) architectures: &'static str,
    /// A fat binary, or PTX without kernels for a placeholder.
    pub(crate) bytes: &'static [u8],
}

/// The driver reads the header of an image as words.
#[repr(C, align(16))]
struct Aligned<T>(T);

include!(concat!(env!("OUT_DIR"), "/images.rs"));

#[cfg(test)]
mod tests {
    use super::IMAGES;

    #[test]
    fn the_embedded_size_is_bounded() {
        let total: usize = IMAGES.iter().map(|image| image.bytes.len()).sum();
        assert!(total <= 10 << 20, "{total} bytes of images, wanted 10 MiB at most");
    }

    /// What ptxas said of each image: a spilled register or a serialised wgmma (C75xx) is a fault.
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
    fn images_are_aligned_and_named_after_files() {
        for image in IMAGES {
            assert_eq!(image.bytes.as_ptr() as usize % 16, 0, "{}", image.name);
            let file = format!("{}/kernels/{}.cu", env!("CARGO_MANIFEST_DIR"), image.name);
            assert!(std::path::Path::new(&file).is_file(), "{file}");
        }
    }
}
