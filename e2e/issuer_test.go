package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// authority is the CA of everything here that speaks TLS: the issuer, the API
// server and the proxy before it.
type authority struct {
	file string // PEM, for SSL_CERT_FILE and kubeconfigs
	pem  []byte
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "kuberollouttrigger e2e"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	ca := &authority{
		file: filepath.Join(tempRoot, "ca.pem"),
		pem:  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		cert: cert,
		key:  key,
	}
	return ca, os.WriteFile(ca.file, ca.pem, 0o644)
}

// serverCert is a certificate for 127.0.0.1, also as PEM of chain and key.
func (ca *authority) serverCert() (cert tls.Certificate, certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return cert, nil, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "127.0.0.1"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		DNSNames:     []string{"localhost"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, ca.cert, key.Public(), ca.key)
	if err != nil {
		return cert, nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return cert, nil, nil, err
	}
	certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	cert, err = tls.X509KeyPair(certPEM, keyPEM)
	return cert, certPEM, keyPEM, err
}

// pool trusts this CA alone.
func (ca *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

const audience = "https://kuberollouttrigger.test"

// issuer stands in for token.actions.githubusercontent.com: same documents,
// same header, same claims, another key.
type issuer struct {
	url     string
	key     *rsa.PrivateKey
	signer  jose.Signer
	server  *httptest.Server
	fetches atomic.Int64 // of the keys

	mu        sync.Mutex
	published jose.JSONWebKeySet
}

const keyID = "38826b17-6a30-5f9b-b169-8beb8202f723"

func newIssuer() (*issuer, error) {
	cert, _, _, err := testCA.serverCert()
	if err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	iss := &issuer{key: key}
	if iss.signer, err = newSigner(key, keyID); err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	reply := func(path string, document func() any) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(document())
		})
	}
	reply("/.well-known/openid-configuration", func() any {
		return map[string]any{
			"issuer":                                iss.url,
			"jwks_uri":                              iss.url + "/.well-known/jwks",
			"subject_types_supported":               []string{"public", "pairwise"},
			"response_types_supported":              []string{"id_token"},
			"id_token_signing_alg_values_supported": []string{"RS256"},
			"scopes_supported":                      []string{"openid"},
		}
	})
	iss.publish(key, keyID)
	reply("/.well-known/jwks", func() any {
		iss.fetches.Add(1)
		iss.mu.Lock()
		defer iss.mu.Unlock()
		return iss.published
	})
	server := httptest.NewUnstartedServer(mux)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that do not trust us are part of the tests
	server.StartTLS()
	iss.url, iss.server = server.URL, server
	return iss, nil
}

// publish adds a key to those that the issuer announces.
func (iss *issuer) publish(key *rsa.PrivateKey, kid string) {
	iss.mu.Lock()
	defer iss.mu.Unlock()
	iss.published.Keys = append(iss.published.Keys, jose.JSONWebKey{Key: key.Public(), KeyID: kid, Algorithm: "RS256", Use: "sig"})
}

func newSigner(key *rsa.PrivateKey, kid string) (jose.Signer, error) {
	return jose.NewSigner(
		jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: kid}},
		(&jose.SignerOptions{}).WithType("JWT").WithHeader("x5t", "ykNaY4qM_ta4k2TgZOCEYLkcYlA"))
}

// claims are those of a push to main of acme/api, as GitHub writes them at the
// time given.
func (iss *issuer) claims(now time.Time) map[string]any {
	return map[string]any{
		"iss": iss.url, "aud": audience, "sub": "repo:acme/api:ref:refs/heads/main",
		"jti": rand.Text(), "iat": now.Unix(), "nbf": now.Unix() - 600, "exp": now.Unix() + 300,
		"actor": "octocat", "actor_id": "583231", "base_ref": "", "check_run_id": "5123456789",
		"event_name": "push", "head_ref": "",
		"job_workflow_ref": "acme/api/.github/workflows/build.yaml@refs/heads/main",
		"job_workflow_sha": "8d3a0d3e2e0b8c8b1f3d5f6a7b8c9d0e1f2a3b4c",
		"ref":              "refs/heads/main", "ref_protected": "true", "ref_type": "branch",
		"repository": "acme/api", "repository_id": "123456789", "repository_owner": "acme",
		"repository_owner_id": "987654", "repository_visibility": "private",
		"run_attempt": "1", "run_id": "9876543210", "run_number": "42",
		"runner_environment": "github-hosted", "sha": "8d3a0d3e2e0b8c8b1f3d5f6a7b8c9d0e1f2a3b4c",
		"workflow": "build", "workflow_ref": "acme/api/.github/workflows/build.yaml@refs/heads/main",
		"workflow_sha": "8d3a0d3e2e0b8c8b1f3d5f6a7b8c9d0e1f2a3b4c",
	}
}

// mint is a token GitHub could have issued at the time given, with some claims
// replaced.
func (iss *issuer) mint(now time.Time, replace map[string]any) string {
	claims := iss.claims(now)
	for name, value := range replace {
		claims[name] = value
	}
	return sign(iss.signer, claims)
}

func sign(signer jose.Signer, claims map[string]any) string {
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		panic(err) // a map of strings and numbers: cannot fail
	}
	return token
}
