package main

import (
	"testing"
	"time"

	"k8s.io/client-go/dynamic"

	"kuberollouttrigger/internal/fake"
)

// newKubeAPI serves a fake Kubernetes API that fails the test on any call that
// the worker may not send.
func newKubeAPI(t *testing.T) *fake.KubernetesAPI {
	t.Helper()
	k := fake.NewKubernetesAPI(func(format string, args ...any) { t.Errorf(format, args...) })
	t.Cleanup(k.Close)
	return k
}

// kubeClient is made the way the worker makes it, from a kubeconfig.
func kubeClient(t *testing.T, kube *fake.KubernetesAPI) dynamic.Interface {
	t.Helper()
	client, err := newKubernetesClient(workerConfig{Kubeconfig: kube.Kubeconfig(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// eventually waits for what has to become true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within 10 s: %s", what)
}
