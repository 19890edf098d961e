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

// defaultCondition holds for a rule that names no event. Others may run the code of a
// pull request, with a token that looks like main's in every other claim.
// https://docs.github.com/en/actions/reference/workflows-and-actions/events-that-trigger-workflows
var defaultCondition = condition{"event_name", patterns{
	"push", "workflow_dispatch", "repository_dispatch", "release", "schedule", "registry_package", "deployment",
}}

// rule lets jobs that meet every condition restart images that match any pattern.
type rule struct {
	name       string
	conditions []condition
	images     patterns
}

// condition is met by a claim that matches one of the values.
type condition struct {
	claim  string
	values patterns
}

// rules returns the rules in force. Without TRUST_POLICY, every job of the owners that runs for a
// default event may restart every image.
func (p *policyConfig) rules() []rule {
	if len(p.TrustPolicy) == 0 {
		return []rule{{"default rule", []condition{defaultCondition}, patterns{"*"}}}
	}
	return p.TrustPolicy
}

// checkClaims is nil if the job may ask for anything at all. Its error is for the
// log: it says for each rule which claim does not match.
func (p *policyConfig) checkClaims(c claims) error {
	if err := p.checkOwner(c); err != nil {
		return err
	}
	var reasons []string
	for _, r := range p.rules() {
		unmet := r.unmetCondition(c)
		if unmet == nil {
			return nil
		}
		reasons = append(reasons, fmt.Sprintf("%s: %s is %s", r.name, unmet.claim, c.show(unmet.claim)))
	}
	if most := 16; len(reasons) > most { // the log line is bounded
		reasons = append(reasons[:most], fmt.Sprintf("and %d more", len(reasons)-most))
	}
	return fmt.Errorf("no rule matches the claims: %s", strings.Join(reasons, "; "))
}

// checkOwner compares in ASCII: a k and U+212A, which EqualFold takes for one letter,
// differ in length.
func (p *policyConfig) checkOwner(c claims) error {
	owner := c.get("repository_owner")
	isOwner := func(o string) bool { return len(o) == len(owner) && strings.EqualFold(o, owner) }
	if !slices.ContainsFunc(p.Orgs, isOwner) {
		return fmt.Errorf("repository_owner is %s, none of GITHUB_ALLOWED_ORG", c.show("repository_owner"))
	}
	if len(p.OrgIDs) > 0 && !slices.Contains(p.OrgIDs, c.get("repository_owner_id")) {
		return fmt.Errorf("repository_owner_id is %s, none of GITHUB_ALLOWED_ORG_ID", c.show("repository_owner_id"))
	}
	return nil
}

// checkImages is nil if one rule allows the job to restart all the images, which
// are canonical. Its error may be told to a job that checkClaims let pass.
func (p *policyConfig) checkImages(c claims, images []string) error {
	most := 0
	for _, r := range p.rules() {
		if r.unmetCondition(c) == nil {
			most = max(most, r.countAllowed(c, images))
		}
	}
	switch {
	case len(images) == 0:
		return errors.New("no image was asked for")
	case most == 0:
		return fmt.Errorf("this job may not restart %s", images[0])
	case most < len(images):
		return fmt.Errorf("this job may not restart %s, or not together with %s", images[most], images[0])
	}
	return nil
}

// unmetCondition returns the first condition that the claims do not meet, or nil.
// An absent claim meets none, not even "*".
func (r *rule) unmetCondition(c claims) *condition {
	for _, cond := range r.conditions {
		if value, ok := c[cond.claim].(string); !ok || !cond.values.match(value) {
			return &cond
		}
	}
	return nil
}

// countAllowed counts the images before the first that matches no pattern.
func (r *rule) countAllowed(c claims, images []string) int {
	allowed := r.images.expand(c)
	for i, image := range images {
		if !allowed.match(image) {
			return i
		}
	}
	return len(images)
}

// riskyEvents can be caused without write access: a check by an app that reports on
// forks, a review by anybody. A pull_request of a fork gets no id-token: write.
var riskyEvents = []string{
	"check_run", "check_suite", "discussion", "discussion_comment", "fork", "gollum", "issue_comment", "issues",
	"pull_request_review", "pull_request_review_comment", "pull_request_target", "status", "watch", "workflow_run",
}

// rulesWithRiskyEvents returns the rules that let risky events in, with the events.
func (p *policyConfig) rulesWithRiskyEvents() (rules []string) {
	for _, r := range p.rules() {
		for _, cond := range r.conditions {
			events := slices.DeleteFunc(slices.Clone(riskyEvents), func(event string) bool { return !cond.values.match(event) })
			if cond.claim == "event_name" && len(events) > 0 {
				rules = append(rules, r.name+": "+strings.Join(events, ", "))
			}
		}
	}
	return rules
}

// describe returns a line for each rule in force.
func (p *policyConfig) describe() (lines []string) {
	for _, r := range p.rules() {
		line := r.name + ": "
		for _, cond := range r.conditions {
			line += cond.claim + "=" + cond.values.join() + " "
		}
		lines = append(lines, line+"may restart "+r.images.join())
	}
	return lines
}

const expectedRules = `expected a list, such as [{claims: {ref: refs/heads/main}, images: ["ghcr.io/{repository}:dev"]}]`

// parseRules reads TRUST_POLICY. What it does not understand, or what can never
// match, is an error: a policy must not mean something else than its author meant.
func parseRules(text string) (rules []rule, err error) {
	var document yaml.Node
	decoder := yaml.NewDecoder(strings.NewReader(text))
	if err := decoder.Decode(&document); err != nil && err != io.EOF {
		return nil, yamlError(err)
	}
	if err := decoder.Decode(&yaml.Node{}); err != io.EOF {
		return nil, errors.New("something follows the list of rules; expected one YAML document")
	}
	document.Content = append(document.Content, &yaml.Node{Line: 1}) // an empty text has none
	list := document.Content[0]
	if list.Kind != yaml.SequenceNode || len(list.Content) == 0 {
		return nil, fmt.Errorf("line %d: no rules; %s", list.Line, expectedRules)
	}
	if err := checkNode(list); err != nil {
		return nil, err
	}
	for i, n := range list.Content {
		r := rule{name: fmt.Sprintf("rule %d", i+1)}
		if err := r.decode(n); err != nil {
			return nil, fmt.Errorf("%s: %w", r.name, err)
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// yamlError makes one line of the library's error.
func yamlError(err error) error {
	return fmt.Errorf("%s; %s", sanitize(strings.Join(strings.Fields(err.Error()), " ")), expectedRules)
}

var plainTags = map[yaml.Kind]string{yaml.SequenceNode: "!!seq", yaml.MappingNode: "!!map", yaml.ScalarNode: "!!str"}

// checkNode refuses what the library would take for a string, or drop silently:
// numbers, nulls, merges, tags such as !deny.
func checkNode(n *yaml.Node) error {
	if tag := n.ShortTag(); n.Kind != yaml.AliasNode && tag != plainTags[n.Kind] {
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

// decode reads the rule as it is written.
func (r *rule) decode(n *yaml.Node) error {
	type trustRule struct { // the library's errors name it
		Claims  map[string]patterns
		Images  patterns
		Unknown map[string]any `yaml:",inline"`
	}
	var w trustRule
	if err := n.Decode(&w); err != nil {
		return yamlError(err)
	}
	for field := range w.Unknown {
		return fmt.Errorf("field %s not found; expected claims and images", sanitize(field))
	}
	if len(w.Claims) == 0 || len(w.Images) == 0 {
		return fmt.Errorf("no claims or no images; %s", expectedRules)
	}
	// Every rule that names no event gets the default ones, whatever other rules
	// name: a rule for preview images must not open the one for production.
	if _, named := w.Claims["event_name"]; !named {
		r.conditions = append(r.conditions, defaultCondition)
	}
	for _, claim := range slices.Sorted(maps.Keys(w.Claims)) {
		if err := checkClaim(claim, w.Claims[claim]); err != nil {
			return fmt.Errorf("claim %s: %w", sanitize(claim), err)
		}
		r.conditions = append(r.conditions, condition{claim, w.Claims[claim]})
	}
	r.images = w.Images
	return checkImagePatterns(r.images)
}

var (
	placeholderRE = regexp.MustCompile(`\{\w+\}`)
	plainRE       = regexp.MustCompile(`^[\w./-]+$`)
	claimNameRE   = regexp.MustCompile(`^[A-Za-z][\w#$-]*$`)
	// registry/path:tag in lower case but for the tag. A star may cover any of it.
	imageRE = regexp.MustCompile(`^(localhost|[a-z\d_\[-]*[.:*][a-z\d_.:*\[\]-]*)/([a-z\d_.:*-]+/)*[a-z\d_.-]*(:[\w*][\w.*-]*|\*[\w.:*-]*)$` +
		`|^[a-z\d_.:\[\]-]*\*[\w.:*\[\]-]*$`)
	// docker.io/nginx is docker.io/library/nginx in canonical form.
	familiarRE = regexp.MustCompile(`^(index\.docker\.io/|docker\.io/[^/*]*:)`)
)

// claimForms are the claims that GitHub documents and people get wrong. The text
// of a pattern has the form, stars included, or it matches one of the examples.
var claimForms = map[string]struct{ form, examples string }{
	"ref":                   {`^(refs/(heads|tags|pull)/[^ ?\[\\^:~]+|(r|re|ref|refs|refs/[a-z]*)?\*[^ ?\[\\^:~]*)?$`, "refs/heads/main or refs/tags/v1"},
	"ref_type":              {`^\*$`, "branch or tag"},
	"ref_protected":         {`^\*$`, "true or false"},
	"event_name":            {`^[a-z_*]+$`, "push or release"},
	"repository":            {`^[\w*-]*[/*][\w.*-]*$`, "owner/name"},
	"repository_owner":      {`^[\w*-]+$`, "owner"},
	"repository_id":         {`^[\d*]+$`, "812345678"},
	"repository_owner_id":   {`^[\d*]+$`, "9919"},
	"repository_visibility": {`^\*$`, "public or private or internal"},
	"runner_environment":    {`^\*$`, "github-hosted or self-hosted"},
	"job_workflow_ref":      {`@|\*$`, "owner/name/.github/workflows/file.yml@refs/heads/main"},
	"workflow_ref":          {`@|\*$`, "owner/name/.github/workflows/file.yml@refs/heads/main"},
}

// checkClaim refuses what is not a claim name, and values that the claim can never
// have. GitHub may add claims, and organizations name repo_property_*.
func checkClaim(name string, values patterns) error {
	known := strings.ReplaceAll(strings.ToLower(name), "-", "_")
	claim, ok := claimForms[known]
	switch {
	case !claimNameRE.MatchString(name):
		return errors.New("is not a claim name")
	case ok && name != known:
		return fmt.Errorf("is not a claim name; expected %s", known)
	case slices.Contains([]string{"iss", "aud", "exp", "iat", "nbf"}, name):
		return errors.New("cannot be matched; web checks it for every token")
	case len(values) == 0:
		return errors.New("an empty list; expected at least one value")
	}
	form, examples := regexp.MustCompile(claim.form), strings.Split(claim.examples, " or ")
	for _, value := range values {
		if placeholderRE.MatchString(string(value)) {
			return fmt.Errorf("%s has a placeholder; expected one in images only", sanitize(string(value)))
		}
		if !form.MatchString(string(value)) && !slices.ContainsFunc(examples, value.matches) {
			return fmt.Errorf("%s can match no token; expected a value such as %s", sanitize(string(value)), claim.examples)
		}
	}
	return nil
}

// checkImagePatterns refuses what no canonical reference can match.
func checkImagePatterns(images patterns) error {
	placeholders := claims{"repository": "owner/name", "repository_owner": "owner", "repository_id": "1"}
	for i, example := range images.expand(placeholders) {
		if !imageRE.MatchString(string(example)) || familiarRE.MatchString(string(example)) {
			return fmt.Errorf("images: %s can match no image; expected registry/name:tag in lower case, such as docker.io/library/nginx:* or "+
				"ghcr.io/{repository}:v*; the placeholders are {repository}, {repository_owner} and {repository_id}", sanitize(string(images[i])))
		}
	}
	return nil
}

// pattern is text in which each star stands for any text, even an empty one, but in
// a pattern with an @ for none with an @.
type pattern string

// matches compares the whole of s. A branch may be called evil@refs/heads/main, and a
// star before the @ of a job_workflow_ref must not take that one for its end.
func (p pattern) matches(s string) bool {
	if !strings.Contains(string(p), "@") {
		return matchesPiece(string(p), s)
	}
	return slices.EqualFunc(strings.Split(string(p), "@"), strings.Split(s, "@"), matchesPiece)
}

// matchesPiece looks for each text between two stars once, so the time is linear
// whatever the number of stars.
func matchesPiece(p, s string) bool {
	text, rest, star := strings.Cut(p, "*")
	s, ok := strings.CutPrefix(s, text)
	for ok && star {
		if text, rest, star = strings.Cut(rest, "*"); !star {
			return strings.HasSuffix(s, text)
		}
		_, s, ok = strings.Cut(s, text)
	}
	return ok && s == ""
}

// patterns is one pattern or a list of them.
type patterns []pattern

func (l *patterns) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode {
		*l = patterns{pattern(n.Value)}
		return nil
	}
	return n.Decode((*[]pattern)(l))
}

func (l patterns) match(s string) bool {
	return slices.ContainsFunc(l, func(p pattern) bool { return p.matches(s) })
}

func (l patterns) join() string {
	var texts []string
	for _, p := range l {
		texts = append(texts, sanitize(string(p)))
	}
	return strings.Join(texts, "|")
}

// expand replaces the placeholders by the claims, in lower case as images are. It
// leaves one alone, to match no image, if the claim is absent or has a star.
func (l patterns) expand(c claims) (expanded patterns) {
	value := func(placeholder string) string {
		value := c.get(strings.Trim(placeholder, "{}"))
		if !plainRE.MatchString(value) {
			return placeholder
		}
		return strings.ToLower(value)
	}
	for _, p := range l {
		expanded = append(expanded, pattern(placeholderRE.ReplaceAllStringFunc(string(p), value)))
	}
	return expanded
}
