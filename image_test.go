package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

const digest = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

// manyTags is a body with n tags.
func manyTags(n int) string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf(`"t%d"`, i))
	}
	return `{"image":"ghcr.io/acme/api","tags":[` + strings.Join(list, ",") + `]}`
}

// requestBodies are bodies of POST /event: want is the images joined by spaces,
// or a part of the error after "!".
func requestBodies() []struct{ body, want string } {
	return []struct{ body, want string }{
		{`{"image":"ghcr.io/acme/api:dev"}`, "ghcr.io/acme/api:dev"},
		{" {\n\"image\" : \"ghcr.io/acme/api:dev\" }\n", "ghcr.io/acme/api:dev"},
		{`{"image":"ghcr.io\/acme\/api:dev"}`, "ghcr.io/acme/api:dev"},
		{`{"image":"nginx:dev"}`, "docker.io/library/nginx:dev"},
		{`{"image":"localhost:5000/api:dev"}`, "localhost:5000/api:dev"},
		{`{"image":"ghcr.io/acme/api","tags":["v1.2.3","v1.2","v1"]}`, "ghcr.io/acme/api:v1.2.3 ghcr.io/acme/api:v1.2 ghcr.io/acme/api:v1"},
		{`{"tags":["v1","v1"],"image":"ghcr.io/acme/api"}`, "ghcr.io/acme/api:v1"},
		{`{"image":"localhost:5000/api","tags":["dev"]}`, "localhost:5000/api:dev"},

		{``, "!cannot be read"},
		{`null`, "!image is missing"},
		{`[]`, "!wrong type"},
		{`"ghcr.io/acme/api:dev"`, "!wrong type"},
		{`{}`, "!image is missing"},
		{`{"image":null}`, "!image is missing"},
		{`{"image":""}`, "!image is missing"},
		{`{"image":7}`, `!wrong type; expected {"image":"ghcr.io/acme/api:dev"}`},
		{`{"image":["ghcr.io/acme/api:dev"]}`, "!wrong type"},
		{`{"IMAGE":"ghcr.io/acme/api:dev"}`, "!unknown field"},
		{`{"Image":"ghcr.io/acme/api:dev"}`, "!unknown field"},
		{`{"image":"ghcr.io/acme/api:dev","image":"ghcr.io/acme/api:dev"}`, "!duplicate field"},
		{`{"image":"ghcr.io/acme/api:dev","imag\u0065":"ghcr.io/acme/web:dev"}`, "!duplicate field"},
		{`{"image":"ghcr.io/acme/api:dev","IMAGE":"ghcr.io/acme/web:dev"}`, "!unknown field"},
		{`{"image":"ghcr.io/acme/api:dev","namespace":"a"}`, "!unknown field"},
		{`{"image":"ghcr.io/acme/api:dev"}{}`, "!cannot be read"},
		{`{"image":"ghcr.io/acme/api:dev"} x`, "!cannot be read"},
		{`{"image":"ghcr.io/acme/api:dev",}`, "!cannot be read, at byte 33: "},
		{`{'image':'ghcr.io/acme/api:dev'}`, "!cannot be read"},
		{"{\"image\":\"ghcr.io/acme/api:dev\xff\"}", "!UTF-8"},
		{"\xef\xbb\xbf" + `{"image":"ghcr.io/acme/api:dev"}`, "!cannot be read"},
		{strings.Repeat(`[`, 8000), "!cannot be read"},

		{`{"image":"ghcr.io/acme/api"}`, "!has no tag"},
		{`{"image":"ghcr.io/acme/api:"}`, "!not a valid reference"},
		{`{"image":"ghcr.io/acme/api:dev@` + digest + `"}`, "!has a digest"},
		{`{"image":"ghcr.io/acme/api@` + digest + `"}`, "!has a digest"},
		{`{"image":"` + strings.Repeat("a", 64) + `"}`, "!not a valid reference"},
		{`{"image":"ghcr.io/Acme/api:dev"}`, "!lower case"},
		{`{"image":"ghcr.io/acme/../../evil:dev"}`, "!not a valid reference"},
		{`{"image":"ghcr.io/acme//api:dev"}`, "!not a valid reference"},
		{`{"image":"https://ghcr.io/acme/api:dev"}`, "!not a valid reference"},
		{`{"image":" ghcr.io/acme/api:dev"}`, "!not a valid reference"},
		{`{"image":"ghcr.io/acme/api:dev\n"}`, "!not a valid reference"},
		{`{"image":"ghcr.io/acme/api:d\u0000ev"}`, "!not a valid reference"},
		{`{"image":"ghcr.io/acme/api:` + strings.Repeat("x", 129) + `"}`, "!not a valid reference"},
		{`{"image":"ghcr.io/acme/` + strings.Repeat("x", 300) + `:dev"}`, "!not a valid reference"},

		{`{"image":"ghcr.io/acme/api:dev","tags":["v1"]}`, "!in one place"},
		{`{"image":"ghcr.io/acme/api","tags":null}`, "!tags must be"},
		{`{"image":"ghcr.io/acme/api:dev","tags":null}`, "!tags must be"},
		{`{"image":"ghcr.io/acme/api","tags":[]}`, "!tags must be"},
		{`{"image":"ghcr.io/acme/api","tags":"v1"}`, "!tags must be"},
		{`{"image":"ghcr.io/acme/api","tags":{"v1":1}}`, "!tags must be"},
		{`{"image":"ghcr.io/acme/api","tags":[1]}`, "!tags must be"},
		{`{"image":"ghcr.io/acme/api","tags":[null]}`, "!tag \"\""},
		{`{"image":"ghcr.io/acme/api","tags":["ok",""]}`, "!tag \"\""},
		{`{"image":"ghcr.io/acme/api","tags":["../x y"]}`, "!is not valid"},
		{`{"image":"ghcr.io/acme/api","tags":["-v1"]}`, "!is not valid"},
		{`{"image":"ghcr.io/acme/api","tags":["v1@` + digest + `"]}`, "!is not valid"},
		{`{"image":"ghcr.io/acme/api","tags":["v1\n"]}`, "!is not valid"},
		{manyTags(maxTags + 1), "!tags must be a list of 1 to 32"},
	}
}

func TestParseRequest(t *testing.T) {
	for _, tt := range requestBodies() {
		images, err := parseRequest([]byte(tt.body))
		if part, wrong := strings.CutPrefix(tt.want, "!"); wrong {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%.100q: got %v, %v; want an error that says %q", tt.body, images, err, part)
			} else if strings.Contains(err.Error(), "\n") || len(err.Error()) > 500 {
				t.Errorf("%.100q: the error is not one short line: %q", tt.body, err)
			}
			continue
		}
		if err != nil || strings.Join(images, " ") != tt.want {
			t.Errorf("%q: got %v, %v; want %s", tt.body, images, err, tt.want)
		}
	}
	if images, err := parseRequest([]byte(manyTags(maxTags))); err != nil || len(images) != maxTags {
		t.Errorf("%d tags: %v", maxTags, err)
	}
}

func TestImagePrefixes(t *testing.T) {
	for list, want := range map[string]string{
		"ghcr.io/acme":                    "ghcr.io/acme",
		"ghcr.io/acme/":                   "ghcr.io/acme",
		" ghcr.io/acme , quay.io/acme/x ": "ghcr.io/acme quay.io/acme/x",
		"ghcr.io":                         "ghcr.io",
		"docker.io/acme":                  "docker.io/acme",
		"index.docker.io/acme":            "docker.io/acme",
		"localhost:5000":                  "localhost:5000",
		"localhost/acme":                  "localhost/acme",
		"registry:5000/acme":              "registry:5000/acme",
		"[::1]:5000/acme":                 "[::1]:5000/acme",
	} {
		got, err := parseImagePrefixes(list)
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: got %v, %v; want %s", list, got, err, want)
		}
	}
	for _, list := range []string{"", ",", "acme", "acme/api", "ghcr.io/acme,", "ghcr.io/Acme", "ghcr.io/acme:dev", "ghcr.io/acme//x", "ghcr.io/*", "https://ghcr.io/acme", "acme:dev/api", "acme:/api", "ghcr.io/acme x"} {
		if got, err := parseImagePrefixes(list); err == nil {
			t.Errorf("%q was accepted as %v", list, got)
		}
	}

	p := imagePrefixes{"ghcr.io/acme", "quay.io/acme/api", "localhost:5000", "example.com"}
	for image, want := range map[string]bool{
		"ghcr.io/acme/api:dev":        true,
		"ghcr.io/acme/team/api:dev":   true,
		"ghcr.io/acme-evil/api:dev":   false,
		"ghcr.io/acme.evil/api:dev":   false,
		"ghcr.io/acm/api:dev":         false,
		"ghcr.io/evil/acme/api:dev":   false,
		"quay.io/acme/api:dev":        true,
		"quay.io/acme/api/sub:dev":    true,
		"quay.io/acme/api2:dev":       false,
		"quay.io/acme:dev":            false,
		"localhost:5000/any:dev":      true,
		"localhost:50001/any:dev":     false,
		"example.com/any:dev":         true,
		"example.com:8443/any:dev":    false,
		"example.com.evil.io/any:dev": false,
	} {
		if got := p.allows(image); got != want {
			t.Errorf("%s: allowed %v, want %v", image, got, want)
		}
	}
}

func TestParseContainerImage(t *testing.T) {
	for image, want := range map[string]struct {
		ref    string
		pinned bool
	}{
		"nginx":                               {ref: "docker.io/library/nginx:latest"},
		"ghcr.io/acme/api:dev":                {ref: "ghcr.io/acme/api:dev"},
		"ghcr.io/acme/api:dev@" + digest:      {ref: "ghcr.io/acme/api:dev", pinned: true},
		"ghcr.io/acme/api@" + digest:          {},
		"":                                    {},
		"ghcr.io/acme/API:dev":                {},
		"${IMAGE}":                            {},
		"registry.k8s.io/e2e/agnhost:2.40":    {ref: "registry.k8s.io/e2e/agnhost:2.40"},
		"localhost:5000/api":                  {ref: "localhost:5000/api:latest"},
		"docker.io/library/nginx:1.29-alpine": {ref: "docker.io/library/nginx:1.29-alpine"},
	} {
		ref, pinned, ok := parseContainerImage(image)
		if ref != want.ref || pinned != want.pinned || ok != (want.ref != "") {
			t.Errorf("%q: got %q, %v, %v; want %+v", image, ref, pinned, ok, want)
		}
	}
}

// What is too long is refused before the library reads it: that takes a quarter of a
// second for each of these.
func TestReferenceLength(t *testing.T) {
	long, start := strings.Repeat("a/", 1<<19)+"a:dev", time.Now()
	for range 20 {
		if _, err := parseImage(long); err == nil {
			t.Error("accepted")
		}
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("20 references of a mebibyte took %s", took)
	}
}

// What is accepted survives the way through Valkey unchanged, and never goes
// beyond the grammar that the strict reading allows.
func FuzzParseRequest(f *testing.F) {
	for _, seed := range []string{
		`{"image":"ghcr.io/acme/api:dev"}`, `{"image":"ghcr.io/acme/api","tags":["v1","v1.2"]}`,
		`{"IMAGE":"a:b"}`, `{"image":"a:b","image":"c:d"}`, `{"image":"a:b"}x`, `{"image":"a","tags":[null]}`, `{"image":"a:b@sha256:00"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		images, err := parseRequest(body)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("the error has several lines: %q", err)
			}
			return
		}
		if len(images) < 1 || len(images) > maxTags {
			t.Fatalf("%d images", len(images))
		}
		// The plain reading must agree with the strict one on what it accepts.
		var plain map[string]any
		if err := json.Unmarshal(body, &plain); err != nil || plain["image"] == nil || len(plain) > 2 {
			t.Fatalf("accepted %q", body)
		}
		for _, image := range images {
			if strings.ContainsAny(image, "\"\\ \n\t@<>") || strings.Contains(image, "..") && strings.Contains(image, "/..") {
				t.Fatalf("accepted image %q", image)
			}
			// As publishScript writes it.
			e, err := parseMessage([]byte(`{"image":"` + image + `","requestedAt":1795226400123456}`))
			if err != nil || e.Image != image || e.RequestedAt != 1795226400123456 {
				t.Fatalf("%q came back as %+v, %v", image, e, err)
			}
		}
		if sorted := slices.Compact(slices.Sorted(slices.Values(images))); len(sorted) != len(images) {
			t.Fatalf("repeated: %v", images)
		}
	})
}

func FuzzParseMessage(f *testing.F) {
	for _, seed := range []string{
		`{"image":"ghcr.io/acme/api:dev","requestedAt":1795226400123456}`, `{"image":"ghcr.io/acme/api:dev"}`,
		`{"image":"x:y","requestedAt":-1}`, `{"image":"x:y","requestedAt":1e3}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		e, err := parseMessage(message)
		if err != nil {
			return
		}
		text, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseMessage(text)
		if err != nil || again != e || e.RequestedAt < 0 {
			t.Fatalf("%q: %+v came back as %+v, %v", message, e, again, err)
		}
	})
}
