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
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"kuberollouttrigger/internal/fake"
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
type issuer struct{ *fake.Issuer }

func newIssuer() (*issuer, error) {
	cert, _, _, err := testCA.serverCert()
	if err != nil {
		return nil, err
	}
	iss := fake.NewIssuer(cert)
	iss.Audience = audience
	return &issuer{iss}, nil
}

// mint is a token GitHub could have issued at the time given, with some claims
// replaced.
func (iss *issuer) mint(now time.Time, replace map[string]any) string {
	return iss.Token(iss.Claims(now, replace))
}

// forge is what mint returns, signed with another key.
func (iss *issuer) forge(key *rsa.PrivateKey, now time.Time) string {
	header, err := json.Marshal(iss.Header())
	if err != nil {
		panic(err) // a map of strings: cannot fail
	}
	payload, err := json.Marshal(iss.Claims(now, nil))
	if err != nil {
		panic(err)
	}
	return fake.Sign(key, header, payload)
}
