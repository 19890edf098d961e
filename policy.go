package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// defaultCondition holds for a rule that does not name event_name. Each of these
// events runs code that somebody with write access put into the repository. Others
// may run the code of a pull request, with a token that looks like main's in every
// other claim.
// https://docs.github.com/en/actions/reference/workflows-and-actions/events-that-trigger-workflows
var defaultCondition = condition{claim: "event_name", isDefault: true, values: []pattern{
	{"push"}, {"workflow_dispatch"}, {"repository_dispatch"}, {"release"}, {"schedule"}, {"registry_package"}, {"deployment"},
}}

// riskyEvents can be caused without write access and have a token like main's.
var riskyEvents = []string{"pull_request_target", "workflow_run"}

// policy decides which verified jobs may restart which images.
type policy struct {
	owners   []string // lower case
	ownerIDs []string // empty: any
	rules    []rule   // never empty
}

// rule allows the jobs that meet all its conditions to restart the images that
// match one of its patterns.
type rule struct {
	name       string
	conditions []condition
	images     []pattern
}

// condition is met by a claim that matches one of the values.
type condition struct {
	claim     string
	values    []pattern
	isDefault bool // the rule does not name the claim itself
}

// newPolicy takes GITHUB_ALLOWED_ORG, GITHUB_ALLOWED_ORG_ID and the rules of
// TRUST_POLICY. Without rules, every job of those owners that runs for a default
// event may restart every image.
func newPolicy(owners, ownerIDs []string, rules []rule) *policy {
	p := &policy{ownerIDs: ownerIDs, rules: rules}
	for _, owner := range owners {
		p.owners = append(p.owners, lowerASCII(owner))
	}
	if len(rules) == 0 {
		p.rules = []rule{{"default rule", []condition{defaultCondition}, []pattern{newPattern("*")}}}
	}
	return p
}

// checkClaims is nil if the job may ask for anything at all. Its error is for the
// log: it says for each rule which claim does not match.
func (p *policy) checkClaims(c claims) error {
	if err := p.checkOwner(c); err != nil {
		return err
	}
	var reasons []string
	for _, r := range p.rules {
		unmet, found := r.unmetCondition(c)
		if !found {
			return nil
		}
		reasons = append(reasons, fmt.Sprintf("%s: %s is %s", r.name, unmet.claim, c.show(unmet.claim)))
	}
	return fmt.Errorf("no rule matches the claims: %s", strings.Join(reasons, "; "))
}

func (p *policy) checkOwner(c claims) error {
	// GitHub's names are ASCII; strings.EqualFold takes U+212A for k.
	if !slices.Contains(p.owners, lowerASCII(c["repository_owner"])) {
		return fmt.Errorf("repository_owner is %s, none of GITHUB_ALLOWED_ORG", c.show("repository_owner"))
	}
	if len(p.ownerIDs) > 0 && !slices.Contains(p.ownerIDs, c["repository_owner_id"]) {
		return fmt.Errorf("repository_owner_id is %s, none of GITHUB_ALLOWED_ORG_ID", c.show("repository_owner_id"))
	}
	return nil
}

// checkImages is nil if one rule allows the job to restart all the images, which
// are canonical references. Its error may be told to a job that checkClaims let
// pass.
func (p *policy) checkImages(c claims, images []string) error {
	if len(images) == 0 {
		return errors.New("no image was asked for")
	}
	most := 0
	for _, r := range p.rules {
		if _, found := r.unmetCondition(c); found {
			continue
		}
		allowed := r.countAllowed(c, images)
		if allowed == len(images) {
			return nil
		}
		most = max(most, allowed)
	}
	if most > 0 {
		return fmt.Errorf("this job may not restart %s, or not together with %s", images[most], images[0])
	}
	return fmt.Errorf("this job may not restart %s", images[0])
}

// unmetCondition returns the first condition that the claims do not meet. An
// absent claim meets none, not even "*".
func (r *rule) unmetCondition(c claims) (unmet condition, found bool) {
	for _, cond := range r.conditions {
		value, present := c[cond.claim]
		if !present || !slices.ContainsFunc(cond.values, func(p pattern) bool { return p.matches(value) }) {
			return cond, true
		}
	}
	return condition{}, false
}

// countAllowed counts the images before the first that matches no pattern.
func (r *rule) countAllowed(c claims, images []string) int {
	denied := slices.IndexFunc(images, func(image string) bool {
		return !slices.ContainsFunc(r.images, func(p pattern) bool {
			expanded, ok := p.expand(c)
			return ok && expanded.matches(image)
		})
	})
	if denied < 0 {
		return len(images)
	}
	return denied
}

// rulesWithRiskyEvents returns the rules whose stars let in a risky event that
// they do not name.
func (p *policy) rulesWithRiskyEvents() (names []string) {
	for _, r := range p.rules {
		for _, cond := range r.conditions {
			if cond.claim == "event_name" && slices.ContainsFunc(cond.values, func(p pattern) bool {
				return p.hasStar() && slices.ContainsFunc(riskyEvents, p.matches)
			}) {
				names = append(names, r.name)
			}
		}
	}
	return names
}

// describe returns a line for each rule in force.
func (p *policy) describe() []string {
	var lines []string
	for _, r := range p.rules {
		line := r.name + ": "
		for _, cond := range r.conditions {
			line += cond.claim + "=" + joinPatterns(cond.values) + " "
		}
		lines = append(lines, line+"may restart "+joinPatterns(r.images))
	}
	return lines
}

// trustRule is a rule of TRUST_POLICY as it is written. The library's errors name it.
type trustRule struct {
	Claims map[string]yamlStrings
	Images yamlStrings
}

// yamlStrings is one string or a list of them, with its line for errors.
type yamlStrings struct {
	texts []string
	line  int
}

func (s *yamlStrings) UnmarshalYAML(n *yaml.Node) error {
	s.line = n.Line
	if n.Kind == yaml.ScalarNode {
		s.texts = []string{n.Value}
		return nil
	}
	return n.Decode(&s.texts)
}

const expectedRules = `expected a list, such as [{claims: {ref: refs/heads/main}, images: ["ghcr.io/{repository}:dev"]}]`

// parseRules reads TRUST_POLICY. A policy that would mean something else than its
// author meant must not start: what parseRules does not understand, or what can
// never match, is an error that names the line.
func parseRules(text string) ([]rule, error) {
	var document yaml.Node
	decoder := yaml.NewDecoder(strings.NewReader(text))
	if err := decoder.Decode(&document); err == io.EOF {
		return nil, errors.New("no rules; " + expectedRules)
	} else if err != nil {
		return nil, yamlError(err)
	}
	if err := decoder.Decode(&yaml.Node{}); err != io.EOF {
		return nil, errors.New("something follows the list of rules; expected one YAML document")
	}
	list := document.Content[0]
	if list.Kind != yaml.SequenceNode || len(list.Content) == 0 {
		return nil, fmt.Errorf("line %d: no rules; %s", list.Line, expectedRules)
	}
	if err := checkNode(list); err != nil {
		return nil, err
	}
	decoder = yaml.NewDecoder(strings.NewReader(text))
	decoder.KnownFields(true) // which Node.Decode cannot do
	var written []trustRule
	if err := decoder.Decode(&written); err != nil {
		return nil, yamlError(err)
	}
	var rules []rule
	for i, w := range written {
		r, err := w.compile(list.Content[i].Line)
		if err != nil {
			return nil, fmt.Errorf("rule %d, %w", i+1, err)
		}
		r.name = fmt.Sprintf("rule %d", i+1)
		rules = append(rules, r)
	}
	return rules, nil
}

// yamlError makes one line of the library's error.
func yamlError(err error) error {
	return fmt.Errorf("%s; %s", sanitize(strings.Join(strings.Fields(err.Error()), " ")), expectedRules)
}

// checkNode refuses what the library would take for a string, or drop silently: a
// number, a null, a tag such as !deny, a merge. A policy holds nothing but lists,
// maps and strings.
func checkNode(n *yaml.Node) error {
	plain := map[yaml.Kind]string{yaml.SequenceNode: "!!seq", yaml.MappingNode: "!!map", yaml.ScalarNode: "!!str"}
	if tag := n.ShortTag(); n.Kind != yaml.AliasNode && tag != plain[n.Kind] {
		return fmt.Errorf("line %d: %s %s is not a plain list, map or string; put numbers, true and false in quotes", n.Line, tag, sanitize(n.Value))
	}
	if strings.ContainsFunc(n.Value, unicode.IsControl) {
		return fmt.Errorf("line %d: %s has a control character; no claim and no image has one", n.Line, sanitize(n.Value))
	}
	for _, child := range n.Content {
		if err := checkNode(child); err != nil {
			return err
		}
	}
	return nil
}

// compile checks a rule that begins at line.
func (w *trustRule) compile(line int) (r rule, err error) {
	if len(w.Claims) == 0 || len(w.Images.texts) == 0 {
		return r, fmt.Errorf("line %d: no claims or no images; %s", line, expectedRules)
	}
	// Every rule that names no event gets the default ones, whatever other rules
	// name: a rule for preview images must not open the one for production.
	if _, named := w.Claims["event_name"]; !named {
		r.conditions = append(r.conditions, defaultCondition)
	}
	for _, claim := range slices.Sorted(maps.Keys(w.Claims)) {
		check := func(value string) error { return checkClaimPattern(claim, value) }
		values, err := w.Claims[claim].patterns("claim "+sanitize(claim), check)
		if err != nil {
			return r, err
		}
		r.conditions = append(r.conditions, condition{claim: claim, values: values})
	}
	r.images, err = w.Images.patterns("images", checkImagePattern)
	return r, err
}

func (s yamlStrings) patterns(what string, check func(string) error) (patterns []pattern, err error) {
	if len(s.texts) == 0 {
		return nil, fmt.Errorf("line %d: %s: an empty list; expected at least one value", s.line, what)
	}
	for _, text := range s.texts {
		if err := check(text); err != nil {
			return nil, fmt.Errorf("line %d: %s: %w", s.line, what, err)
		}
		patterns = append(patterns, newPattern(text))
	}
	return patterns, nil
}

var (
	placeholderRE = regexp.MustCompile(`\{(repository|repository_owner|repository_id)\}`)
	bracesRE      = regexp.MustCompile(`\{\w+\}`)
	claimNameRE   = regexp.MustCompile(`^[A-Za-z][\w#$-]*$`)
	familiarRE    = regexp.MustCompile(`^(index\.docker\.io/|docker\.io/[^/*]*:)`)
	// A ref, no ref, or a star that may cover what is missing of one.
	refRE        = regexp.MustCompile(`^(refs/(heads|tags|pull)/[^ ?\[\\^:~]+|(r|re|ref|refs|refs/[a-z]*)?\*[^ ?\[\\^:~]*)?$`)
	imageCharsRE = regexp.MustCompile(`^[\w./:*\[\]-]+$`)
)

// claimForms are the claims that GitHub documents and people get wrong. A pattern
// of theirs, stars included, matches form; or one of values matches the pattern.
var claimForms = map[string]struct {
	form     *regexp.Regexp
	values   []string
	expected string
}{
	"ref":                   {form: refRE, expected: "refs/heads/name or refs/tags/name"},
	"ref_type":              {values: []string{"branch", "tag"}, expected: "branch or tag"},
	"ref_protected":         {values: []string{"true", "false"}, expected: `"true" or "false"`},
	"event_name":            {form: regexp.MustCompile(`^[a-z_*]+$`), expected: "the name of an event, such as push"},
	"repository":            {form: regexp.MustCompile(`^[\w*-]*[/*][\w.*-]*$`), expected: "owner/name"},
	"repository_owner":      {form: regexp.MustCompile(`^[\w*-]+$`), expected: "an owner's name"},
	"repository_id":         {form: regexp.MustCompile(`^[\d*]+$`), expected: "a number"},
	"repository_owner_id":   {form: regexp.MustCompile(`^[\d*]+$`), expected: "a number"},
	"repository_visibility": {values: []string{"public", "private", "internal"}, expected: "public, private or internal"},
	"runner_environment":    {values: []string{"github-hosted", "self-hosted"}, expected: "github-hosted or self-hosted"},
	"job_workflow_ref":      {form: regexp.MustCompile(`@|\*$`), expected: "owner/name/.github/workflows/file.yml@ref"},
	"workflow_ref":          {form: regexp.MustCompile(`@|\*$`), expected: "owner/name/.github/workflows/file.yml@ref"},
}

// checkClaimPattern refuses what is not a claim name, and values that the claim
// can never have. GitHub may add claims, and names repo_property_* after an
// organization's properties.
func checkClaimPattern(name, s string) error {
	if !claimNameRE.MatchString(name) {
		return errors.New("is not a claim name")
	}
	known := strings.ReplaceAll(lowerASCII(name), "-", "_")
	if _, ok := claimForms[known]; ok && name != known {
		return fmt.Errorf("is not a claim name; expected %s", known)
	}
	if slices.Contains([]string{"iss", "aud", "exp", "iat", "nbf"}, name) {
		return errors.New("cannot be matched; web checks it for every token")
	}
	if bracesRE.MatchString(s) {
		return fmt.Errorf("%s has a placeholder; expected one in images only", sanitize(s))
	}
	claim, ok := claimForms[name]
	possible := !ok || claim.form != nil && claim.form.MatchString(s) || slices.ContainsFunc(claim.values, newPattern(s).matches)
	if !possible {
		return fmt.Errorf("%s can match no token; expected %s", sanitize(s), claim.expected)
	}
	return nil
}

// checkImagePattern refuses what no canonical reference can match.
func checkImagePattern(s string) error {
	expanded, _ := newPattern(s).expand(claims{"repository": "owner/name", "repository_owner": "owner", "repository_id": "1"})
	example := expanded.String()
	if strings.ContainsAny(example, "{}") {
		return fmt.Errorf("%s has an unknown placeholder; expected {repository}, {repository_owner} or {repository_id}", sanitize(s))
	}
	// docker.io/nginx is docker.io/library/nginx in canonical form.
	if !possibleImage(example) || familiarRE.MatchString(example) {
		return fmt.Errorf("%s can match no image; expected registry/name:tag in lower case, such as ghcr.io/{repository}:v* or docker.io/library/nginx:*", sanitize(s))
	}
	return nil
}

// possibleImage looks at what stands outside the stars.
func possibleImage(s string) bool {
	if !imageCharsRE.MatchString(s) || strings.Contains(s, "//") {
		return false
	}
	host, _, hasPath := strings.Cut(s, "/")
	isHost := hasPath && (host == "localhost" || strings.ContainsAny(host, ".:"))
	if !isHost && !strings.Contains(host, "*") {
		return false
	}
	// The name ends at the colon before the tag, or at a star that may cover it.
	last := strings.LastIndex(s, "/") + 1
	length := strings.IndexAny(s[last:], ":*")
	if length < 0 || strings.ContainsFunc(s[:last+length], unicode.IsUpper) {
		return false
	}
	tag, hasColon := strings.CutPrefix(s[last+length:], ":")
	return !hasColon || tag != "" && !strings.ContainsAny(tag[:1], ".-") && !strings.Contains(tag, ":")
}

// pattern is the text before, between and after the stars of a pattern; one
// element is text without a star.
type pattern []string

func newPattern(s string) pattern { return strings.Split(s, "*") }

func (p pattern) String() string { return strings.Join(p, "*") }

func (p pattern) hasStar() bool { return len(p) > 1 }

func joinPatterns(patterns []pattern) string {
	var texts []string
	for _, p := range patterns {
		texts = append(texts, sanitize(p.String()))
	}
	return strings.Join(texts, "|")
}

// matches compares the whole of s. Each text is looked for once, right after the
// one before it, so the time is linear whatever the number of stars.
func (p pattern) matches(s string) bool {
	if !p.hasStar() {
		return s == p[0]
	}
	first, last := p[0], p[len(p)-1]
	if len(s) < len(first)+len(last) || !strings.HasPrefix(s, first) || !strings.HasSuffix(s, last) {
		return false
	}
	s = s[len(first) : len(s)-len(last)]
	for _, text := range p[1 : len(p)-1] {
		i := strings.Index(s, text)
		if i < 0 {
			return false
		}
		s = s[i+len(text):]
	}
	return true
}

// expand replaces the placeholders by the claims, in lower case as images are. A
// star in a claim stays a star, because p was split before. ok is false if a claim
// is absent or empty.
func (p pattern) expand(c claims) (expanded pattern, ok bool) {
	ok = true
	for _, text := range p {
		expanded = append(expanded, placeholderRE.ReplaceAllStringFunc(text, func(placeholder string) string {
			value := c[strings.Trim(placeholder, "{}")]
			ok = ok && value != ""
			return lowerASCII(value)
		}))
	}
	return expanded, ok
}

// lowerASCII leaves other letters alone: strings.ToLower makes a k of U+212A, and
// a name with it is somebody else's.
func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}
