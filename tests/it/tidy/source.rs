//! The code of a source file: its text without comments, the contents of strings, and unit tests.

/// The text of a Rust or C++ file with comments and the contents of literals blanked. Line numbers
/// do not change.
pub fn code(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let (kept, blanked) = match first {
            '/' if rest.starts_with("//") => (0, rest.find('\n').unwrap_or(rest.len())),
            '/' if rest.starts_with("/*") => (0, block_comment(rest)),
            '"' => (1, string(rest)),
            'r' | 'b' if !code.ends_with(is_of_name) && raw_string(rest) > 0 => {
                (1, raw_string(rest))
            }
            '\'' => (1, character(rest)),
            _ => (first.len_utf8(), first.len_utf8()),
        };
        code.push_str(&rest[..kept]);
        code.extend(rest[kept..blanked].chars().map(|c| if c == '\n' { c } else { ' ' }));
        rest = &rest[blanked..];
    }
    code
}

const TEST: &str = "#[cfg(test)]";

fn is_of_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Bytes of the comment that `text` begins with; Rust's comments nest.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text[at..];
        match () {
            () if rest.starts_with("/*") => (depth, at) = (depth + 1, at + 2),
            () if rest.starts_with("*/") => (depth, at) = (depth - 1, at + 2),
            () => at += rest.chars().next().map_or(1, char::len_utf8),
        }
        if depth == 0 {
            break;
        }
    }
    at.min(text.len())
}

/// Bytes of the string literal that `text` begins with.
fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            '"' if !escaped => return at + 1,
            _ => escaped = c == '\\' && !escaped,
        }
    }
    text.len()
}

/// Bytes of the literal `r"..."`, `r#"..."#` or `br"..."` that `text` begins with; 0 if it begins
/// with none.
fn raw_string(text: &str) -> usize {
    let begin = text.strip_prefix('b').unwrap_or(text);
    let Some(begin) = begin.strip_prefix('r') else { return 0 };
    let hashes = begin.len() - begin.trim_start_matches('#').len();
    let Some(inside) = begin[hashes..].strip_prefix('"') else { return 0 };
    let end = format!("\"{}", "#".repeat(hashes));
    let inside = inside.find(&end).map_or(inside.len(), |at| at + end.len());
    text.len() - begin.len() + hashes + 1 + inside
}

/// Bytes of the character literal that `text` begins with; 1 where the quote begins a lifetime.
fn character(text: &str) -> usize {
    let mut inside = text.char_indices().skip(1);
    match inside.next() {
        Some((_, '\\')) => {
            inside.next();
            inside.find(|(_, c)| *c == '\'').map_or(text.len(), |(at, _)| at + 1)
        }
        Some(_) => inside.next().filter(|(_, c)| *c == '\'').map_or(1, |(at, _)| at + 1),
        None => 1,
    }
}

/// [`code`] of a Rust file, with every item under `#[cfg(test)]` blanked.
pub fn library_code(text: &str) -> String {
    let mut code = code(text);
    while let Some(start) = code.find(TEST) {
        let end = start + TEST.len() + item(&code[start + TEST.len()..]);
        let blank: String =
            code[start..end].chars().map(|c| if c == '\n' { c } else { ' ' }).collect();
        code.replace_range(start..end, &blank);
    }
    code
}

/// The files of modules that a Rust file declares for tests alone.
pub fn test_modules(name: &str, text: &str) -> Vec<String> {
    let code = code(text);
    let folder = match name.rsplit_once('/') {
        Some((folder, "mod.rs" | "lib.rs")) => folder,
        _ => name.trim_end_matches(".rs"),
    };
    let items = code.split(TEST).skip(1).map(|rest| &rest[..item(rest)]);
    let modules = items.filter_map(|item| item.trim_end_matches(';').rsplit_once("mod "));
    let declared = modules.filter(|(_, module)| module.chars().all(is_of_name));
    declared.map(|(_, module)| format!("{folder}/{module}.rs")).collect()
}

/// Bytes to the end of the item that comes next: its semicolon, or the brace that closes its body.
fn item(code: &str) -> usize {
    let mut depth = 0;
    for (at, c) in code.char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => depth -= 1,
            _ => {}
        }
        if depth == 0 && matches!(c, ';' | '}') {
            return at + 1;
        }
    }
    code.len()
}

#[test]
fn comments_and_strings_are_no_code() {
    let cases = [
        ("a.b(); // c.unwrap()", "a.b(); "),
        ("//! x\nlet y; /* atomic\nz */ w", " \nlet y; \n w"),
        ("/* /* a */ b */ c", " c"),
        (r#"url("https://x") + y; // z"#, r#"url(" ) + y; "#),
        (r##"p(r#"a "quoted" // b"#, c) // d"##, r##"p(r , c) "##),
        (r#"var"x"; f("\"", 'a', '"', '\'', b)"#, r#"var" ; f(" , ' , ' , ' , b)"#),
        ("fn f<'a>(x: &'a str) {} // g", "fn f<'a>(x: &'a str) {} "),
    ];
    for (text, wanted) in cases {
        let (got, mut short) = (code(text), String::new());
        assert_eq!(got.len(), text.len());
        for c in got.chars() {
            if c != ' ' || !short.ends_with(' ') {
                short.push(c);
            }
        }
        assert_eq!(short, wanted, "{text}");
    }
}

#[test]
fn what_follows_a_unit_test_is_code() {
    let text = "a();\n#[cfg(test)]\nmod tests;\nb();\n#[cfg(test)]\n#[allow(x)]\n\
        fn f(a: [u8; 2]) -> u8 {\n{ c(); }\n}\nd();\n#[cfg(test)]\nmod inner { e(); }\n";
    let code = library_code(text);
    for (word, wanted) in [("a()", 0), ("b()", 3), ("d()", 9)] {
        assert_eq!(code.lines().position(|line| line.contains(word)), Some(wanted), "{word}");
    }
    for word in ["tests", "c()", "e()", "u8", "cfg"] {
        assert!(!code.contains(word), "{word} in {code}");
    }
    assert_eq!(code.lines().count(), text.lines().count());
    assert_eq!(test_modules("src/x.rs", text), ["src/x/tests.rs"]);
    assert_eq!(test_modules("src/x/mod.rs", text), ["src/x/tests.rs"]);
}
