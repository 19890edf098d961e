package main

import (
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestClaimForms: what a claim can be, and the mistakes that the table catches.
func TestClaimForms(t *testing.T) {
	for claim, values := range map[string]struct{ possible, impossible []string }{
		"ref": {[]string{"", "*", "r*", "refs/*", "refs/heads/*", "refs/h*", "refs/pull/*/merge", "refs/tags/v*", "*/main", "refs/heads/caf\u00e9"},
			[]string{"main", "release/*", "refs/main", "refs/heads/", "refs/heads", "refs/heads/release/?", "refs/heads/main ", "heads/*", "refs/x/*", "Refs/*"}},
		"ref_type":              {[]string{"branch", "t*", "*"}, []string{"branches", "x*", ""}},
		"ref_protected":         {[]string{"true", "false", "*e"}, []string{"yes", "True"}},
		"event_name":            {[]string{"push", "pull_*", "*"}, []string{"Push", "", "pull-request", "push "}},
		"repository":            {[]string{"acme/api", "acme/*", "*", "*/api", "a*", "acme/.github"}, []string{"api", "https://github.com/acme/api", "acme/a b", "acme/api/x", ""}},
		"repository_owner":      {[]string{"acme", "a*"}, []string{"acme/api", "", "acme "}},
		"repository_id":         {[]string{"1", "8*"}, []string{"x*", "acme", ""}},
		"repository_owner_id":   {[]string{"9919"}, []string{"acme", "9 9"}},
		"repository_visibility": {[]string{"private", "*"}, []string{"hidden"}},
		"runner_environment":    {[]string{"*-hosted"}, []string{"hosted"}},
		"job_workflow_ref":      {[]string{"acme/x/.github/workflows/d.yml@refs/heads/main", "acme/*", "*@refs/tags/v*"}, []string{"acme/x/.github/workflows/d.yml", "*d.yml"}},
		"workflow_ref":          {[]string{"*"}, []string{"d.yml"}},
		"environment":           {[]string{"", "Production", "a b", "\u00e9"}, nil},
		"repo_property_team":    {[]string{"x"}, nil},
	} {
		for _, value := range values.possible {
			if err := checkClaim(claim, []pattern{pattern(value)}); err != nil {
				t.Errorf("%s: %q: %v", claim, value, err)
			}
		}
		for _, value := range values.impossible {
			if err := checkClaim(claim, []pattern{pattern(value)}); err == nil {
				t.Errorf("%s: %q is accepted", claim, value)
			}
		}
	}
}

func TestImagePatterns(t *testing.T) {
	for s, ok := range map[string]bool{
		"*": true, "*:*": true, "*/*": true, "*:dev": true, "*.io/*": true, "ghcr.io/*": true, "ghcr.io/acme/*": true, "gh*": true,
		"ghcr.io/acme/api*": true, "ghcr.io/acme/api:*": true, "ghcr.io/*/api:v1*": true, "ghcr.io/{repository}:v*": true,
		"ghcr.io/{repository}/*:dev": true, "ghcr.io/x/{repository_owner}-{repository_id}:{repository_id}": true,
		"docker.io/library/nginx:latest": true, "docker.io/{repository}:dev": true, "docker.io/*:dev": true, "docker.io/*": true,
		"localhost/x:dev": true, "localhost:5000/x:dev": true, "registry:5000/a/b:c": true, "127.0.0.1:5000/a:b": true,
		"[::1]:5000/a/b:c": true, "registry.example.com/a__b/c---d/e.f:V1_2-x": true, "ghcr.io/a/b:" + strings.Repeat("x", 128): true,
		"ghcr.io/acme/*DEV": true, "ghcr.io/acme:*": true,

		"": false, "nginx": false, "nginx:dev": false, "acme/api:dev": false, "{repository}:dev": false, "{repository_owner}/x:dev": false,
		"ghcr.io": false, "ghcr.io:dev": false, "ghcr.io/acme/api": false, "ghcr.io/{repository}": false, "ghcr.io/*/api": false, "ghcr.io/acme/": false,
		"ghcr.io/acme/api:": false, "ghcr.io/Acme/api:dev": false, "GHCR.io/acme/api:dev": false, "ghcr.io/ACME/*": false, "ghcr.io/acme/api: dev": false,
		"https://ghcr.io/acme/api:dev": false, "ghcr.io//acme:dev": false, "/acme/api:dev": false,
		"ghcr.io/acme/api:.dev": false, "ghcr.io/acme/api:-*": false, "ghcr.io/acme/api:dev/x": false, "ghcr.io/a:b:c": false, "ghcr.io/x:{repository}": false,
		"ghcr.io/acme/api@sha256:0123456789abcdef": false, "ghcr.io/acme/api:dev@*": false, "*@*": false,
		"ghcr.io/acmé/api:dev": false, "ghcr.io/acme/api:dev\n": false, "ghcr.io/acme/api:d?v": false,
		"docker.io/nginx:dev": false, "docker.io/nginx:*": false, "index.docker.io/nginx:dev": false, "docker.io/{repository_owner}:dev": false,
	} {
		if err := checkImagePatterns([]pattern{pattern(s)}); (err == nil) != ok {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// TestMatchIsLinear has the input that takes a backtracking matcher for ever.
func TestMatchIsLinear(t *testing.T) {
	p := pattern(strings.Repeat("a*", 2000) + "b")
	if p.matches(strings.Repeat("a", 100_000)) {
		t.Error("matched")
	}
}

// matchesSimply is the definition: a star is nothing, or a byte and the star.
func matchesSimply(p, s string) bool {
	row := make([]bool, len(s)+1) // row[i]: p up to here matches s[:i]
	row[0] = true
	for _, c := range []byte(p) {
		next := make([]bool, len(s)+1)
		for i := range next {
			if c == '*' {
				next[i] = row[i] || i > 0 && next[i-1]
			} else {
				next[i] = i > 0 && row[i-1] && s[i-1] == c
			}
		}
		row = next
	}
	return row[len(s)]
}

func FuzzMatch(f *testing.F) {
	for _, seed := range [][2]string{
		{"", ""}, {"*", ""}, {"*", "x"}, {"a*a", "a"}, {"a*a", "aa"}, {"**", "x"}, {"a**b", "ab"}, {"*ab*ab*", "abab"}, {"*ab*ba*", "aba"},
		{"refs/heads/*", "refs/heads/main"}, {"ghcr.io/acme/api:v*", "ghcr.io/acme/api:v1.2"}, {"*:d*v", "localhost:5000/x:dev"}, {"a.b", "axb"},
		{"a*", "b"}, {"*a", "b"}, {"a*b*c", "abcbc"}, {"é*", "é\xff"}, {"1*", "12"}, {"acme/*", "acme/api"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, p, s string) {
		if len(p) > 200 || len(s) > 1000 {
			t.Skip("slow")
		}
		want := matchesSimply(p, s)
		if got := pattern(p).matches(s); got != want {
			t.Errorf("%q matches %q: %t", p, s, got)
		}
		if !want {
			return
		}
		// The tables refuse nothing that could match.
		for claim, form := range realClaims {
			if form.MatchString(s) && utf8.ValidString(p) && checkClaim(claim, []pattern{pattern(p)}) != nil {
				t.Errorf("%s: %q is refused and matches %q", claim, p, s)
			}
		}
		if ref, err := parseImage(s); err == nil && ref == s && s == strings.ToLower(s) && checkImagePatterns([]pattern{pattern(p)}) != nil {
			t.Errorf("%q is refused and matches %q", p, s)
		}
	})
}

// realClaims are the values that GitHub can write.
var realClaims = map[string]*regexp.Regexp{
	"ref":                   regexp.MustCompile(`\A(refs/(heads|tags|pull)/[^ ?*\[\\^:~{}]+)?\z`),
	"ref_type":              regexp.MustCompile(`\A(branch|tag)\z`),
	"ref_protected":         regexp.MustCompile(`\A(true|false)\z`),
	"event_name":            regexp.MustCompile(`\A[a-z_]+\z`),
	"repository":            regexp.MustCompile(`\A[\w-]+/[\w.-]+\z`),
	"repository_owner":      regexp.MustCompile(`\A[\w-]+\z`),
	"repository_id":         regexp.MustCompile(`\A\d+\z`),
	"repository_owner_id":   regexp.MustCompile(`\A\d+\z`),
	"repository_visibility": regexp.MustCompile(`\A(public|private|internal)\z`),
	"runner_environment":    regexp.MustCompile(`\A(github|self)-hosted\z`),
	"job_workflow_ref":      regexp.MustCompile(`\A[\w-]+/[\w.-]+/[^{}]+@[^{}]+\z`),
}
