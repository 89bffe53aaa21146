use super::*;
use crate::testing::shared;
use sha2::{Digest, Sha256};

fn variables() -> BTreeMap<String, String> {
    BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())])
}

fn render(source: &str, messages: &[Message]) -> Result<String, String> {
    let template = ChatTemplate::new(source.to_owned(), variables())?;
    template.render(messages, false).map_err(|e| e.to_string())
}

fn chat() -> Vec<Message> {
    [
        ("user", "Hello <there> & \"you\"?"),
        ("assistant", "Hi!\n\nHow can I help?"),
        ("user", " What is 2 + 2? "),
        ("assistant", "4"),
    ]
    .map(|(role, content)| Message::new(role, content))
    .to_vec()
}

#[test]
fn chatml_renders_exactly() {
    let source = "{% for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n{% endfor %}\n{% if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{% endif %}\n";
    // Jinja2's output: `trim_blocks` removes newlines after blocks, not after expressions.
    let wanted = "<|im_start|>user\nHello <there> & \"you\"?<|im_end|>\n\n<|im_start|>assistant\nHi!\n\nHow can I help?<|im_end|>\n\n";
    assert_eq!(render(source, &chat()[..2]).as_deref(), Ok(wanted));
}

#[test]
fn transformers_features_render_exactly() {
    let source = "{{ bos_token }}{% set ns = namespace(n=0) %}\
        {% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}\
        {%- generation %}{{ m.content.strip().split(' ')[0] | tojson }}{% endgeneration -%} |{% endfor %}\
        {{ ns.n }} {{ strftime_now('%d %b %Y') }} {{ strftime_now('%-d.%-m.%%') }} {{ tools is none }} {{ nothing }}{{ messages[0] | tojson }}{{ eos_token }}";
    let wanted = "<s>\"Hello\"|\"Hi!\\n\\nHow\"|\"What\"|3 26 Jul 2024 26.7.% True {\"role\": \"user\", \"content\": \"Hello <there> & \\\"you\\\"?\"}</s>";
    assert_eq!(render(source, &chat()).as_deref(), Ok(wanted));
}

#[test]
fn refusals_and_errors_are_messages() {
    for (source, wanted) in [
        ("{{ raise_exception('roles must alternate') }}", "the template says: roles must alternate"),
        ("{% if %}", "does not compile"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "endless loop"),
        ("{% for i in range(9999) %}{{ 'aaaaaaaaaa' * 1000000 }}{% endfor %}", "16 MiB of output"),
        ("{{ 'a' * 2000000000 }}", "too large"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ messages.__class__.__mro__ }}", "undefined"),
        ("{% include '/etc/passwd' %}", "not"),
        ("{{ open('/etc/passwd') }}", "unknown"),
    ] {
        let error = render(source, &chat()).expect_err(source);
        assert!(error.contains(wanted), "{source}: {error}");
    }
}

#[test]
fn hostile_sources_end() {
    for source in ["{{".repeat(50_000), "{% if a %}".repeat(50_000), format!("{{{{ {} }}}}", "(".repeat(100_000))] {
        assert!(render(&source, &chat()).is_err());
    }
    assert!(render(&"x".repeat(MAX_SOURCE_BYTES + 1), &chat()).is_err_and(|e| e.contains("limit")));
    assert_eq!(plain_blocks("{% generation"), "{% generation");
    assert_eq!(
        plain_blocks("a{%- endgeneration +%}{% set generation = 1 %}"),
        "a{%- endif +%}{% set generation = 1 %}"
    );
}

/// Every template of the collection against Jinja2 as transformers 5.17 runs it, the date fixed to the same day.
/// `error` where Python fails; iterating over none is an error there and nothing here, so any end will do.
#[test]
fn real_templates_equal_jinja2() {
    let Some(folder) = shared("data/configs/chat-templates") else { return };
    let mut wrong = Vec::new();
    for line in include_str!("../testdata/templates.txt").lines() {
        let Some((name, wanted)) = line.split_once(' ') else { continue };
        let Ok(source) = std::fs::read_to_string(folder.join(name)) else { continue };
        let got = match render(&source, &chat()) {
            Ok(text) => crate::source::hex(&Sha256::digest(&text))[..16].to_owned(),
            Err(e) => e,
        };
        if got != wanted && wanted != "error" {
            wrong.push(format!("{name}: {got}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
